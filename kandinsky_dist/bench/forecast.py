"""`estimate`: predictions of a run elsewhere as a record, and what of them rests on records from here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kandinsky_dist.bench import forecast_picture
from kandinsky_dist.bench.forecast_check import measured_rows, records_below
from kandinsky_dist.bench.forecast_inputs import compute_of, links_of
from kandinsky_dist.bench.forecast_report import summary, to_markdown
from kandinsky_dist.bench.record import Record
from kandinsky_dist.config.loader import Resolved, command_line_layer, load
from kandinsky_dist.config.schema import STAGES, Config, Stage
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.estimate.forecast import Assumptions, Cluster, Forecaster, best_of_each
from kandinsky_dist.estimate.links import GPUS, Links, PublishedLinks
from kandinsky_dist.estimate.memory import GIB, HEADROOM
from kandinsky_dist.estimate.published import (
    MLPERF,
    NUM_FITTED,
    ONE_NODE_RATE,
    fitted,
    predicted_seconds,
    steady_scaling,
)
from kandinsky_dist.estimate.survey import Survey
from kandinsky_dist.models.architectures import MAX_TOKENS

CURVE_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED_GPUS = (64, 256, 1024)
PUBLISHED_TEXT_TOKENS = 24
PUBLISHED_BATCHES: dict[Stage, int] = {"prior": 16384, "decoder": 4096}
"""Samples a step, whatever the number of GPUs: the recipes' own are for 8."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, beside the configuration.

    Attributes:
        num_gpus: numbers of GPUs, rising.
        gpus_per_node: of them on one node; fewer GPUs than that are on one.
        gpu: of `links.GPUS`.
        nic_gbits: of one GPU's NIC; None: its server's.
        num_text_tokens: of a caption.
        is_alone: whether no other strategies are looked at, which takes most of the time.
        train_record, comm_record: measured times in place of published rates, or None.
    """

    num_gpus: tuple[int, ...]
    gpus_per_node: int = 8
    gpu: str = "h100"
    nic_gbits: float | None = None
    num_text_tokens: int = MAX_TOKENS
    assumptions: Assumptions = field(default_factory=Assumptions)
    is_alone: bool = False
    train_record: Path | None = None
    comm_record: Path | None = None

    def cluster(self, num_gpus: int) -> Cluster:
        """So many of the GPUs."""
        gpu = GPUS[self.gpu]
        links: Links = PublishedLinks.of(gpu, self.nic_gbits)
        if self.comm_record is not None:
            links = links_of(Record.load(self.comm_record))
        return Cluster(gpu, num_gpus, min(self.gpus_per_node, num_gpus), links)


def ask(resolved: Resolved, question: Question, out: Path | None) -> None:
    """Predicts, prints the tables, and writes OUT/estimate.json, estimate.md and estimate.png if asked.

    Raises:
        ConfigError: the run does not fit into the GPUs' memory, said after everything is printed.
    """
    if out is not None:
        forecast_picture.require_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
    rows, refusal = rows_of(resolved.config, question)
    record = _record(resolved, question, rows)
    print(summary(record), end="")
    if out is not None:
        _save(record, out)
    if refusal:
        raise ConfigError(refusal)


def publish(out: Path, records: Path | None) -> None:
    """The page of documentation: both full recipes at 64, 256 and 1,024 H100s, beside what was measured.

    Args:
        out: folder for estimate.json, estimate.md and estimate.png.
        records: folder in which records of `bench scaling` and `bench comm` are looked for.
    """
    forecast_picture.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    question = Question(num_gpus=PUBLISHED_GPUS, num_text_tokens=PUBLISHED_TEXT_TOKENS)
    rows = published_rows()
    if records is not None:
        rows += measured_rows(records_below(records, "scaling"), records_below(records, "comm"))
    for stage in STAGES:
        settings = [f"--data.global_batch_size={PUBLISHED_BATCHES[stage]}", "--data.source=cached"]
        resolved = load(stage, f"{stage}_full", [command_line_layer(settings)])
        rows += rows_of(resolved.config, question)[0]
    record = Record.now(
        "estimate",
        device="no device",
        command="kandinsky-dist bench estimate OUT" + (" --records RECORDS" if records else ""),
        setting=_setting(question),
        rows=rows,
    )
    _save(record, out)
    print(to_markdown(record), end="")


def rows_of(config: Config, question: Question) -> tuple[list[dict[str, Any]], str]:
    """Rows of a record, and one line if what is asked for does not fit."""
    assumptions = question.assumptions
    if question.train_record is not None:
        measured = compute_of(Record.load(question.train_record), config)
        assumptions = Assumptions(measured=measured, jitter=assumptions.jitter)
    survey = Survey(config, question.num_text_tokens)
    forecaster = Forecaster(config, survey, assumptions)
    stage = {"stage": config.stage}
    rows: list[dict[str, Any]] = [
        {
            "kind": "network",
            **stage,
            "num_values": survey.num_values,
            "num_trained": survey.num_trained,
            "encoder_values": survey.encoder_values,
            "is_published": survey.networks.is_published,
            "flops_per_sample": forecaster.flops_per_sample(),
            "encoder_flops": survey.encoder_flops,
            "precision": forecaster.precision,
            "resolution": config.data.resolution if config.stage == "decoder" else None,
            "num_text_tokens": question.num_text_tokens if config.stage == "prior" else None,
            "is_alone": question.is_alone,
            "compute": assumptions.measured.source if assumptions.measured else None,
        }
    ]
    refusal = ""
    for number in question.num_gpus:
        cluster = question.cluster(number)
        found = forecaster.forecast(
            cluster, micro_batch_size=_micro(config, config.data.global_batch_size, number)
        )
        rows.append({"kind": "forecast", **stage, **found.as_row()})
        if not found.fits and not refusal:
            refusal = _refusal(forecaster, cluster, found.memory.total)
        best = [] if question.is_alone else best_of_each(forecaster.candidates(cluster))
        rows += [{"kind": "candidate", **stage, **item.as_row()} for item in best]
    rows += [{"kind": "curve", **stage, **row} for row in _curve(forecaster, question)]
    return rows, refusal


def _refusal(forecaster: Forecaster, cluster: Cluster, num_bytes: float) -> str:
    data, parallel = forecaster.config.data, forecaster.config.parallel
    largest = forecaster.largest_micro_batch(cluster)
    remedy = (
        f"the largest that fits is {largest}"
        if largest
        else "the states alone leave no room: shard more (zero2, zero3, fsdp2) or take larger GPUs"
    )
    return (
        f"data.micro_batch_size={data.micro_batch_size} needs {num_bytes / GIB:.1f} GiB under "
        f"{parallel.strategy} on {cluster.num_gpus} GPUs, of which each leaves {cluster.room / GIB:.1f} GiB: "
        f"{remedy}"
    )


def _curve(forecaster: Forecaster, question: Question) -> list[dict[str, Any]]:
    """Samples a second over GPUs: the global batch as it is, and growing with the GPUs."""
    data = forecaster.config.data
    rows = []
    for number in CURVE_GPUS:
        if number % min(question.gpus_per_node, number):
            continue
        cluster = question.cluster(number)
        batches = {"grown": data.micro_batch_size * number}
        if data.global_batch_size % number == 0:
            batches["fixed"] = data.global_batch_size
        for scaling, total in batches.items():
            share = total // number
            micro = max(size for size in range(1, min(share, data.micro_batch_size) + 1) if share % size == 0)
            found = forecaster.forecast(cluster, micro_batch_size=micro, global_batch_size=total)
            rows.append({"scaling": scaling, **found.as_row()})
    return rows


def _micro(config: Config, global_batch_size: int, num_gpus: int) -> int:
    """The configuration's micro-batch, or the largest below it that divides a GPU's share of the batch."""
    share = global_batch_size // num_gpus
    return max(size for size in range(1, min(share, config.data.micro_batch_size) + 1) if share % size == 0)


def published_rows() -> list[dict[str, Any]]:
    """MLPerf's runs beside what the model of time says of them."""
    compute = fitted()
    return [
        {
            "kind": "published",
            "rate": ONE_NODE_RATE,
            "num_gpus": point.num_gpus,
            "micro_batch_size": point.micro_batch_size,
            "scaling": point.scaling,
            "measured_seconds": point.seconds,
            "compute_seconds": compute.seconds(point.micro_batch_size),
            "predicted_seconds": predicted_seconds(point, compute),
            "steady_scaling": steady_scaling(point, compute),
            "is_fitted": index < NUM_FITTED,
        }
        for index, point in enumerate(MLPERF)
    ]


def _record(resolved: Resolved, question: Question, rows: Sequence[dict[str, Any]]) -> Record:
    config = resolved.config
    words = [f"kandinsky-dist estimate {config.stage} --gpus {' '.join(map(str, question.num_gpus))}"]
    words.append(f"--gpu {question.gpu} --gpus-per-node {question.gpus_per_node}")
    return Record.now(
        "estimate",
        device="no device",
        command=" ".join(words),
        setting=_setting(question),
        rows=list(rows),
    )


def _setting(question: Question) -> dict[str, Any]:
    gpu = GPUS[question.gpu]
    measured = question.train_record is not None
    return {
        "gpu": gpu.device_name,
        "source": gpu.source,
        "gpus_per_node": question.gpus_per_node,
        "nic_gbits": question.nic_gbits or gpu.nic_rate * 8 / 1e9,
        "mfu": None if measured else question.assumptions.mfu,
        "fixed_seconds": None if measured else question.assumptions.fixed_seconds,
        "peak_tflops": gpu.peak_flops / 1e12,
        "jitter": question.assumptions.jitter,
        "headroom": HEADROOM,
        "has_measured_links": question.comm_record is not None,
    }


def _save(record: Record, out: Path) -> None:
    record.save(out / "estimate.json")
    (out / "estimate.md").write_text(to_markdown(record), "utf-8")
    (out / "estimate.png").write_bytes(forecast_picture.draw(record))
