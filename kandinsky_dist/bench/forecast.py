"""`estimate`: predictions of a run elsewhere as a record, and what of them rests on records from here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kandinsky_dist.bench import forecast_picture
from kandinsky_dist.bench.forecast_report import summary, to_markdown
from kandinsky_dist.bench.record import Record
from kandinsky_dist.config.loader import Resolved, command_line_layer, load
from kandinsky_dist.config.schema import STAGES, Config
from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.estimate.forecast import Assumptions, Cluster, Forecaster, best_of_each
from kandinsky_dist.estimate.links import GPUS, Links, MeasuredLinks, PublishedLinks
from kandinsky_dist.estimate.memory import GIB, HEADROOM
from kandinsky_dist.estimate.published import MLPERF, NUM_FITTED, ONE_NODE_RATE, fitted, predicted_seconds
from kandinsky_dist.estimate.survey import Survey
from kandinsky_dist.estimate.time import Compute
from kandinsky_dist.models.architectures import MAX_TOKENS

CURVE_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED_GPUS = (64, 256, 1024)


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


def publish(out: Path) -> None:
    """The page of documentation: both full recipes at 64, 256 and 1,024 H100s, beside published runs."""
    forecast_picture.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    question = Question(num_gpus=PUBLISHED_GPUS)
    rows = published_rows()
    for stage in STAGES:
        # The recipes' global batches are for 8 GPUs; here every number of GPUs shares one.
        total = {"prior": 16384, "decoder": 4096}[stage]
        resolved = load(stage, f"{stage}_full", [command_line_layer([f"--data.global_batch_size={total}"])])
        found, _ = rows_of(resolved.config, question)
        rows += found
    record = Record.now(
        "estimate",
        device="no device",
        command="kandinsky-dist bench estimate OUT",
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
        found = forecaster.forecast(cluster)
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
            "is_fitted": index < NUM_FITTED,
        }
        for index, point in enumerate(MLPERF)
    ]


def compute_of(record: Record, config: Config) -> Compute:
    """Computing time of one device, from a record of `bench train` or `bench scaling`.

    Raises:
        DataError: no row in it is of one rank that trains this stage.
    """
    points = [
        (row["micro_batch_size"], median(row["step_seconds"]) / _num_micro(row))
        for row in record.rows
        if row.get("stage") == config.stage
        and row.get("way") == "ours"
        and row["world_size"] == 1
        and row["step_seconds"]
    ]
    if not points:
        raise DataError(
            f"the record of {record.command!r} has no row of one rank that trains the {config.stage}: "
            "kandinsky-dist bench train makes one"
        )
    return Compute.fitted(points, f"{record.device}, {record.date}")


def _num_micro(row: dict[str, Any]) -> int:
    return max(1, row["global_batch_size"] // (row["micro_batch_size"] * row["world_size"]))


def links_of(record: Record) -> MeasuredLinks:
    """Latency and bandwidth of the ranks that a record of `bench comm` was taken with.

    Raises:
        DataError: it is of another case.
    """
    if record.case != "comm":
        raise DataError(f"a record of bench {record.case} knows no collectives: give one of bench comm")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in record.rows:
        if row["kind"] == "collective":
            points.setdefault(row["collective"], []).append((row["num_bytes"], median(row["seconds"])))
    return MeasuredLinks.fitted(points, record.setting["world_size"])


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
