"""The end of a process: it leaves its process groups, and ends in time with its exit code if it hangs."""

import subprocess
import sys

import leaving_programs
import pytest
from helpers import forked
from helpers.command import train_arguments

pytestmark = pytest.mark.dist


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
