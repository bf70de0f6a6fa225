import os
import signal
import subprocess
import sys

import pytest
from helpers import forked
from helpers.command import keys, losses, train_arguments
from helpers.running import end_all, ranks_of, wait_until

pytestmark = pytest.mark.integration

ENVIRONMENT = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}


def test_a_killed_rank_is_restarted_in_place_and_ctrl_c_saves_and_ends_with_75(
    repository, tiny_models, small_corpus, tmp_path
):
    """By itself, from the last checkpoint, to the losses and samples of a run that nothing happened to."""
    settings = ("checkpoint.every_steps=3", "data.num_workers=1")
    places = {"models": tiny_models, "corpus": small_corpus}
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = train_arguments(
        "prior", *settings, "run.max_steps=100000", **places, run_dir=run_dir, strategy="ddp"
    )
    with log.open("w") as output:
        run = subprocess.Popen(
            [str(repository / "launch" / "local.sh"), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            # One more than is needed: a stop on request is no crash, and nothing is restarted.
            env={**ENVIRONMENT, "MAX_RESTARTS": "2"},
            start_new_session=True,
        )
    try:
        wait_until(lambda: list(run_dir.glob("checkpoints/step_*/COMMIT")), run)
        ranks_of(run)[1].kill()
        wait_until(
            lambda: "\nstep " in log.read_text().partition(f"resumed {run_dir / 'checkpoints'}")[2], run
        )
        os.killpg(run.pid, signal.SIGINT)  # what a terminal does
        run.wait(timeout=300)
    finally:
        end_all(run)
    said = log.read_text()
    assert run.returncode == 75, said
    assert said.count("restarted in place") == 1
    assert "rank 1: -9" in said
    assert said.count(f"resumed {run_dir / 'checkpoints'}") == 1
    found = losses(run_dir)
    assert list((run_dir / "checkpoints").glob(f"step_{len(found):08d}/COMMIT")), said
    done = forked.train(
        "prior", *settings, f"run.max_steps={len(found)}", **places, run_dir=tmp_path / "undisturbed",
        world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert found == losses(tmp_path / "undisturbed")
    # The rank that was left may have noted the samples of a step that the killed one did not finish.
    noted = {step: names for step, names in keys(run_dir).items() if step <= len(found)}
    assert noted == keys(tmp_path / "undisturbed")


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
