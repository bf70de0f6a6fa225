"""`bench memory-gpu`: peak memory of real training steps beside the prediction of `estimate`.

The measured figure is that of the trainer's own metrics: bytes allocated on the GPU, without CUDA's context.
On a CPU it is the resident memory of the process, which says nothing about the prediction.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.render import Column, percent, provenance, table, wrapped
from kandinsky_dist.bench.train import Inputs, make_inputs
from kandinsky_dist.bench.train_inputs import about_corpus, cached_shards
from kandinsky_dist.bench.train_measure import device_of
from kandinsky_dist.config.loader import Layer, load
from kandinsky_dist.config.resolve import check, num_micro
from kandinsky_dist.config.schema import Config, Stage
from kandinsky_dist.errors import KandinskyError
from kandinsky_dist.estimate.memory import GIB, Memory, memory
from kandinsky_dist.estimate.survey import Survey
from kandinsky_dist.models.architectures import MAX_TOKENS
from kandinsky_dist.telemetry.sinks import read_metrics

NUM_STEPS = 3
"""The optimizer's states exist from the first step on, so that the second is the fullest."""
NEVER = 10**9
POLL_SECONDS = 0.2


def run(out: Path, inputs: Inputs, *, stages: Sequence[Stage]) -> Record:
    """Measure and predict; write OUT/memory_gpu.json after each stage, then memory_gpu.md, and print that.

    Args:
        out: folder; networks and corpus are made in it, or found there from an earlier call.
        inputs: networks, corpus and settings.
        stages: trained networks.

    Raises:
        ConfigError: the settings cannot work.
        KandinskyError: training failed.
    """
    device_type = device_of(1)
    common = make_inputs(out, inputs, stages, 1)
    rows: list[dict[str, Any]] = []
    for stage in stages:
        rows.append(_row(out, stage, common[stage], inputs, device_type))
        given = [f"--{key} {value}" for key, value in inputs.settings.items()]
        record = Record.now(
            "memory_gpu",
            device=device_name(device_type),
            command=" ".join(
                [f"kandinsky-dist bench memory-gpu OUT --size {inputs.size} --stage", *stages, *given]
            ),
            setting={"size": inputs.size, "device_type": device_type, "num_steps": NUM_STEPS},
            rows=rows,
            packages=("transformers", "accelerate"),
        )
        record.save(out / "memory_gpu.json")
    (out / "memory_gpu.md").write_text(to_markdown(record), "utf-8")
    print(to_markdown(record), end="")
    return record


def _row(
    out: Path, stage: Stage, common: Mapping[str, str], inputs: Inputs, device_type: str
) -> dict[str, Any]:
    """Measure and predict one network."""
    precision = "bf16" if device_type == "cuda" else "fp32"
    values = {"parallel.strategy": "ddp", "parallel.precision": precision, **common, "data.source": "cached"}
    values["data.shards"] = inputs.shards or str(cached_shards(out, stage, common))
    with tempfile.TemporaryDirectory(prefix=".memory.", dir=out) as folder:
        values |= {
            "run.dir": folder,
            "run.resume": "never",
            "run.max_steps": str(NEVER),
            "checkpoint.every_steps": str(NEVER),
            "telemetry.log_every_steps": "1",
            "telemetry.report_to": "[]",
        }
        resolved = load(stage, None, [Layer("bench memory-gpu", values)])
        check(resolved, world_size=1)
        measured = measured_gib(stage, values, Path(folder))
    config = resolved.config
    tokens = math.ceil(about_corpus(inputs.size)["mean_caption_tokens"]) if stage == "prior" else MAX_TOKENS
    held = predicted(config, tokens)
    return {
        "stage": stage,
        "strategy": config.parallel.strategy,
        "precision": config.parallel.precision,
        "micro_batch_size": config.data.micro_batch_size,
        "num_micro": num_micro(config, world_size=1),
        "num_text_tokens": tokens if stage == "prior" else None,
        "measured_gib": measured,
        "estimated_gib": held.total / GIB,
        **held.as_row(),
    }


def predicted(config: Config, num_text_tokens: int) -> Memory:
    """Return the prediction of `kandinsky-dist estimate` for one GPU."""
    return memory(
        Survey(config, num_text_tokens),
        config.parallel,
        config.parallel.precision,
        num_ranks=1,
        micro_batch_size=config.data.micro_batch_size,
        num_micro=num_micro(config, world_size=1),
        num_averages=len(config.optim.ema_decay),
    )


def measured_gib(stage: Stage, values: Mapping[str, str], folder: Path) -> float:
    """Train some steps with the `train` command and return the largest peak in its metrics.

    Raises:
        KandinskyError: training ended by itself.
    """
    words = [f"--{key}={value}" for key, value in values.items()]
    log, metrics = folder / "train.log", folder / "metrics.jsonl"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kandinsky_dist", "train", stage, *words],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while True:
            has_ended = process.poll() is not None
            found = read_metrics(metrics) if metrics.exists() else []
            if len(found) >= NUM_STEPS:
                return max(float(entry["peak_memory_gib"]) for entry in found)
            if has_ended:
                lines = log.read_text("utf-8", "replace").strip().splitlines()
                raise KandinskyError(f"train {stage} failed: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()  # a run that is asked to stop saves itself first: gigabytes that nobody needs
        process.wait()


def to_markdown(record: Record) -> str:
    """Return the page of a record."""
    columns = [
        Column("stage", lambda row: row["stage"], is_number=False),
        Column("strategy", lambda row: row["strategy"], is_number=False),
        Column("precision", lambda row: row["precision"], is_number=False),
        Column("micro-batch", lambda row: f"{row['micro_batch_size']} x {row['num_micro']}"),
        Column("measured GiB", lambda row: f"{row['measured_gib']:.2f}"),
        Column("estimated GiB", lambda row: f"{row['estimated_gib']:.2f}"),
        Column("estimate off by", lambda row: percent(row["estimated_gib"] / row["measured_gib"] - 1)),
    ]
    return "\n".join(
        [
            "# Peak memory of a training step\n",
            wrapped(provenance(record)) + "\n",
            table(columns, record.rows),
        ]
    )
