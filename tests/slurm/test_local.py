import os
import signal
import subprocess
import sys

import pytest
from helpers.command import metrics, train_arguments

pytestmark = pytest.mark.integration


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
        env={**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix},
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
