import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ground import arguments, losses

pytestmark = pytest.mark.slurm

STEPS = 4


def submit(cluster, repository: Path, stage: str, words: list[str], *options: str) -> int:
    return cluster.sbatch(
        ["--nodes=2", "--gpus-per-node=2", *options, str(repository / "slurm" / f"{stage}.sbatch"), *words],
        env={"KANDINSKY_CONFIG": f"{stage}_tiny", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        cwd=repository,
    )


def alone(stage: str, words: list[str]) -> None:
    command = [sys.executable, "-m", "kandinsky_dist", "train", stage, "--config", f"{stage}_tiny", *words]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("stage", "strategy"), [("prior", "zero2"), ("decoder", "ddp")])
def test_two_nodes_of_two_ranks_lose_what_one_process_loses(
    stage, strategy, cluster, repository, ground, tmp_path
):
    job = submit(
        cluster,
        repository,
        stage,
        arguments(ground, tmp_path / "four", STEPS, "--parallel.strategy", strategy),
    )
    alone(stage, arguments(ground, tmp_path / "one", STEPS, "--parallel.strategy", "ddp"))
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    expected = losses(tmp_path / "one")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "four") == pytest.approx(expected, abs=1e-5), cluster.output(job)


def test_a_signal_to_the_batch_shell_stops_with_75_and_the_same_command_finishes(
    cluster, repository, ground, tmp_path
):
    num_steps = 40
    words = arguments(ground, tmp_path / "run", num_steps)
    job = submit(cluster, repository, "prior", words)
    cluster.wait_output(job, "step 1/", timeout=300)
    cluster.signal(job, signal.SIGUSR1, batch=True)
    cluster.wait(job, timeout=120)
    assert cluster.exit_code(job) == 75, cluster.output(job)
    assert 1 <= max(losses(tmp_path / "run")) < num_steps

    job = submit(cluster, repository, "prior", words)
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, num_steps + 1)), "every step once, none repeated or left out"


def test_a_mistake_in_the_settings_ends_the_job_with_78_and_its_line(cluster, repository, ground, tmp_path):
    words = arguments(ground, tmp_path / "run", STEPS, "--data.global_batch_size", "6")
    job = submit(cluster, repository, "decoder", words)
    cluster.wait(job, timeout=120)
    assert cluster.exit_code(job) == 78, cluster.output(job)
    assert "data.global_batch_size=6 must be a multiple" in cluster.output(job)
