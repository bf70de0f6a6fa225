import os
import signal
import subprocess
import sys

import pytest
from ground import arguments, losses

pytestmark = pytest.mark.integration


def test_ctrl_c_saves_and_ends_with_75_on_one_machine(repository, ground, tmp_path):
    num_steps = 200
    command = [str(repository / "launch" / "local.sh"), "train", "prior", "--config", "prior_tiny"]
    run = subprocess.Popen(
        [*command, *arguments(ground, tmp_path / "run", num_steps)],
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
    assert 1 <= max(losses(tmp_path / "run")) < num_steps
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/COMMIT")), printed
