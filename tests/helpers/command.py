"""The trainer as a user starts it: the command line, alone or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kandinsky_dist.telemetry.sinks import read_metrics

# Small enough for seconds, large enough that accumulation and two ranks divide the batch.
DEFAULTS = {
    "run.max_steps": 2,
    "data.global_batch_size": 8,
    "data.micro_batch_size": 4,
    "data.num_workers": 0,
    "data.audit": "true",
    "optim.learning_rate": 1e-3,
    "checkpoint.every_steps": 1000,
    "telemetry.log_every_steps": 1,
    "telemetry.report_to": "[]",
}
STAGE_DEFAULTS = {"prior": {}, "decoder": {"data.resolution": 64}}


def train(
    stage: str,
    *settings: str,
    models: Path,
    corpus: Path,
    run_dir: Path,
    world_size: int = 1,
    strategy: str = "ddp",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs `kandinsky-dist train` to its end and returns what it said, whatever its exit code.

    Args:
        stage: "prior" or "decoder".
        settings: "section.key=value", over the defaults above.
        models: folder with prior/ and decoder/.
        corpus: folder with train/ and validation/, whose shards are data.shards and validation.shards.
        run_dir: run.dir; the same one again continues the run.
        world_size: processes; more than one are started by torchrun.
        strategy: parallel.strategy.
        timeout: seconds after which all processes are ended and TimeoutExpired is raised.
    """
    arguments = train_arguments(
        stage, *settings, models=models, corpus=corpus, run_dir=run_dir, strategy=strategy
    )
    return command(*arguments, world_size=world_size, timeout=timeout)


def train_arguments(
    stage: str, *settings: str, models: Path, corpus: Path, run_dir: Path, strategy: str
) -> list[str]:
    """What follows `kandinsky-dist` on the command line of `train`."""
    values: dict[str, Any] = {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        "model.prior": models / "prior",
        "model.decoder": models / "decoder",
        "data.shards": corpus / "train",
        "validation.shards": corpus / "validation",
        "run.dir": run_dir,
        "parallel.strategy": strategy,
        **dict(setting.split("=", 1) for setting in settings),
    }
    return ["train", stage, *(f"--{key}={value}" for key, value in values.items())]


def command(
    *arguments: object, world_size: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs one `kandinsky-dist` command on one thread a process, without a GPU."""
    started = ["-m", "kandinsky_dist", *map(str, arguments)]
    if world_size > 1:
        started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *started]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, *started],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: torchrun ends its processes, which are in groups of their own
            out, error = process.communicate()
            raise subprocess.TimeoutExpired(process.args, timeout, out, error) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Entries of metrics.jsonl, one a step."""
    return read_metrics(run_dir / "metrics.jsonl")


def losses(run_dir: Path) -> list[float]:
    """The loss of every logged step."""
    return [entry["loss"] for entry in metrics(run_dir)]


def keys(run_dir: Path) -> dict[int, list[str]]:
    """Step -> sorted keys that all ranks together trained on; a rank's own are in audit/rank_*.jsonl."""
    found: dict[int, list[str]] = {}
    for path in sorted((run_dir / "audit").glob("rank_*.jsonl")):
        for entry in read_metrics(path):
            found.setdefault(entry["step"], []).extend(entry["keys"])
    return {step: sorted(names) for step, names in sorted(found.items())}
