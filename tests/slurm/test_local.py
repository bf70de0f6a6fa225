import os
import signal
import subprocess
import sys

import pytest
from helpers import forked
from helpers.command import keys, losses, metrics, train_arguments
from helpers.running import kill_all, ranks_of, wait_until

pytestmark = pytest.mark.integration

ENVIRONMENT = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}


def test_ctrl_c_saves_and_ends_with_75_on_one_machine(repository, tiny_models, small_corpus, tmp_path):
    num_steps = 200
    words = train_arguments(
        "prior",
        f"run.max_steps={num_steps}",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
        strategy="ddp",
    )
    run = subprocess.Popen(
        [str(repository / "launch" / "local.sh"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A stop on request is no crash: nothing is restarted.
        env={**ENVIRONMENT, "MAX_RESTARTS": "2"},
        start_new_session=True,
    )
    assert run.stdout
    printed = ""
    for line in run.stdout:
        printed += line
        if "step 1/" in line:
            break
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    printed += run.stdout.read()
    run.stdout.close()
    assert run.wait() == 75, printed
    assert 1 <= len(metrics(tmp_path / "run")) < num_steps
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/COMMIT")), printed


def test_a_killed_rank_is_restarted_in_place(repository, tiny_models, small_corpus, tmp_path):
    """By itself, from the last checkpoint, to the losses and samples of a run that nothing happened to."""
    settings = ("run.max_steps=60", "checkpoint.every_steps=3", "data.num_workers=1")
    places = {"models": tiny_models, "corpus": small_corpus}
    run_dir = tmp_path / "run"
    run = subprocess.Popen(
        [
            str(repository / "launch" / "local.sh"),
            *train_arguments("prior", *settings, **places, run_dir=run_dir, strategy="ddp"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "MAX_RESTARTS": "1"},
    )
    try:
        wait_until(lambda: list(run_dir.glob("checkpoints/step_*/COMMIT")), run)
        ranks_of(run)[1].kill()
        _, said = run.communicate(timeout=300)
    finally:
        kill_all(run)
    assert run.returncode == 0, said
    assert said.count("restarted in place") == 1
    assert "rank 1: -9" in said
    assert said.count(f"resumed {run_dir / 'checkpoints'}") == 1
    done = forked.train("prior", *settings, **places, run_dir=tmp_path / "undisturbed", world_size=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    assert keys(run_dir) == keys(tmp_path / "undisturbed")


def test_a_mistake_in_the_settings_is_not_tried_again(repository, tiny_models, small_corpus, tmp_path):
    words = train_arguments(
        "prior", "data.global_batch_size=6", models=tiny_models, corpus=small_corpus, run_dir=tmp_path,
        strategy="ddp",
    )  # fmt: skip
    done = subprocess.run(
        [str(repository / "launch" / "local.sh"), *words],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "MAX_RESTARTS": "3"},
    )
    assert done.returncode == 78, done.stderr
    assert "restarted" not in done.stderr
