"""The end of a process: it leaves its process groups, and ends in time with its exit code if it hangs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dist import leaving_programs
from helpers import forked
from helpers.command import train_arguments

from kandinsky_dist.bench.checkpoint import measure as measure_checkpoint
from kandinsky_dist.bench.memory import Case

pytestmark = pytest.mark.dist

NUM_RUNS = int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "10"))


# Not zero3: DeepSpeed keeps its stage-3 engines, whose references are Python's own and so go without a wait.
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_no_thread_of_a_group_outlives_training(strategy, tiny_models, small_corpus, tmp_path):
    arguments = train_arguments(
        "prior", models=tiny_models, corpus=small_corpus, run_dir=tmp_path, strategy=strategy
    )
    assert forked.run_on_ranks(leaving_programs.train, 2, arguments) == [(0, [])] * 2


def test_a_group_ends_although_its_engine_is_still_held():
    for during, after in forked.run_on_ranks(leaving_programs.keep_engine, 2):
        assert during
        assert after == []


@pytest.mark.parametrize(
    ("is_recorded", "is_stopped", "code"), [(True, False, 0), (True, True, 75), (False, False, 1)]
)
def test_a_rank_that_hangs_while_it_leaves_ends_with_its_own_exit_code(
    is_recorded, is_stopped, code, tmp_path
):
    done = forked.call(leaving_programs.hang, tmp_path, is_recorded, is_stopped, timeout=60)
    assert done.returncode == code, done.stderr
    assert "leaving_programs.py" in done.stderr, "no stack of the thread that hangs"


def test_our_launcher_ends_with_the_exit_code_of_a_rank_that_hangs(tmp_path):
    launcher = Path(__file__).parents[2] / "launch" / "run_ranks.py"
    ranks = ["--standalone", "--nproc-per-node=2", leaving_programs.__file__, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(launcher), *ranks],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 75, done.stderr
    assert len(list(tmp_path.iterdir())) == 2, "both ranks have come as far as leaving"
    assert "in release" in done.stderr, "no rank has hung"


def test_an_interpreter_that_hangs_at_its_end_is_ended_with_the_exit_code_of_the_command():
    program = (
        "import atexit, ctypes, sys\n"
        "from kandinsky_dist import __main__\n"
        "from kandinsky_dist.runtime import deadline\n"
        "deadline.LEAVE_SECONDS = 1.0\n"
        "atexit.register(ctypes.PyDLL(None).pause)\n"
        "sys.argv = ['kandinsky-dist', 'check', 'prior', '--data.seed=1']\n"
        "__main__.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78, done.stderr
    assert "data.seed" in done.stderr


@pytest.mark.campaign
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_training_never_hangs_at_its_end(strategy, tiny_models, small_corpus, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus, "strategy": strategy, "world_size": 2}
    for number in range(NUM_RUNS):
        run_dir = tmp_path / str(number)
        done = forked.train("prior", "checkpoint.every_steps=2", **places, run_dir=run_dir, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "most recent call first" not in done.stderr, f"run {number} hung: {done.stderr}"
        shutil.rmtree(run_dir)


@pytest.mark.campaign
def test_bench_checkpoint_never_hangs_at_its_end(tmp_path):
    """The engine is a local of the function that has left its group: the hang was seen there."""
    case = Case("prior", "tiny", "ddp", "auto")
    for number in range(NUM_RUNS):
        forked.run_on_ranks(measure_checkpoint, 2, case, tmp_path / str(number), 1)


@pytest.mark.campaign
def test_precompute_never_hangs_at_its_end(tiny_models, small_corpus, tmp_path):
    shards = (f"--model.prior={tiny_models / 'prior'}", f"--data.shards={small_corpus / 'validation'}")
    for number in range(NUM_RUNS):
        out = tmp_path / str(number)
        done = forked.command("precompute", "prior", *shards, f"--out={out}", world_size=2, timeout=200)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(out)
