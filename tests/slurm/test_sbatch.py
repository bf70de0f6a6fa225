import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

STEPS = 4
BATCH = ["--data.global_batch_size", "8", "--data.micro_batch_size", "2", "--telemetry.log_every_steps", "1"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with tiny models and shards, made by the commands a user has."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("ground")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(24):
        Image.new("RGB", (64, 64), (index * 10, 255 - index * 7, index * 5)).save(
            pictures / f"{index:02}.png"
        )
        (pictures / f"{index:02}.txt").write_text(f"a plain square, shade {index}")
    for words in (
        ["data", "pack", str(pictures), str(folder / "shards"), "--samples-per-shard", "8"],
        ["models", "init", "--size", "tiny", str(folder / "models")],
    ):
        subprocess.run([sys.executable, "-m", "kandinsky_dist", *words], check=True)
    return folder


def arguments(ground: Path, run_dir: Path, *more: str) -> list[str]:
    words = ["--model.prior", f"{ground}/models/prior", "--model.decoder", f"{ground}/models/decoder"]
    words += ["--data.shards", f"{ground}/shards", "--run.dir", str(run_dir), "--parallel.precision", "fp32"]
    return [*words, "--run.max_steps", str(STEPS), *BATCH, *more]


def submit(cluster, repository: Path, stage: str, words: list[str], *options: str) -> int:
    return cluster.sbatch(
        ["--nodes=2", "--gpus-per-node=2", *options, str(repository / "slurm" / f"{stage}.sbatch"), *words],
        env={"KANDINSKY_CONFIG": f"{stage}_tiny", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        cwd=repository,
    )


def alone(stage: str, words: list[str]) -> None:
    command = [sys.executable, "-m", "kandinsky_dist", "train", stage, "--config", f"{stage}_tiny", *words]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize(("stage", "strategy"), [("prior", "zero2"), ("decoder", "ddp")])
def test_two_nodes_of_two_ranks_lose_what_one_process_loses(
    stage, strategy, cluster, repository, ground, tmp_path
):
    job = submit(
        cluster, repository, stage, arguments(ground, tmp_path / "four", "--parallel.strategy", strategy)
    )
    alone(stage, arguments(ground, tmp_path / "one", "--parallel.strategy", "ddp"))
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    expected = losses(tmp_path / "one")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "four") == pytest.approx(expected, abs=1e-5), cluster.output(job)


def test_a_signal_to_the_batch_shell_stops_with_75_and_the_same_command_finishes(
    cluster, repository, ground, tmp_path
):
    num_steps = 40
    words = arguments(ground, tmp_path / "run", "--run.max_steps", str(num_steps))
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
    words = arguments(ground, tmp_path / "run", "--data.global_batch_size", "6")
    job = submit(cluster, repository, "decoder", words)
    cluster.wait(job, timeout=120)
    assert cluster.exit_code(job) == 78, cluster.output(job)
    assert "data.global_batch_size=6 must be a multiple" in cluster.output(job)
