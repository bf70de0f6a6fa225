"""What `bench comm` measured, as Markdown. All figures come from the record."""

from statistics import median
from typing import Any

from kandinsky_dist.bench.collectives import bus_factor
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, number, provenance, table, wrapped

Row = dict[str, Any]
COMMUNICATION = ("overlapped", "not overlapped", "none")
UNITS = ((2**20, "MiB"), (2**10, "KiB"))

INTRODUCTION = """
{world_size} ranks on {nodes} over {backend}. Medians of {num_repeats} repeats; a repeat's time is that of its
slowest rank, and all that is compared was measured in turns, by the same processes.
"""
COLLECTIVES = """
**Algorithm bandwidth** is the message's size over the time. **Bus bandwidth** is what must cross a rank's
link in that time whatever the algorithm, and what hardware is rated by: 2 (N - 1)/N times as much for an
all-reduce, (N - 1)/N for the others, as in nccl-tests. The size is what a rank puts in (all-reduce,
reduce-scatter) or gets out (all-gather).
"""
STEPS = """
Forward, backward and AdamW of the prior of `--size {size}` ({num_parameters:,} trained parameters,
{precision}) with {batch} a rank. *Not overlapped*: ddp reduces all gradients in one bucket after backward,
in ZeRO backward waits for every bucket. *None*: ddp leaves gradients unreduced (`no_sync`); ZeRO, which would
not step then, does all the rest, and its collectives return at once. zero3 computes with what it gathers, so
it has no such row.
"""
READING = """
**Exposed** is what a step takes beyond the one without communication: the median of the differences within
each round, and its share of the step. Below 0 it is less than the machine's noise.
"""
ON_CPUS = """
Here ranks communicate with the cores that they compute with: little can be hidden, and each bucket costs.
"""


def milliseconds(row: Row) -> float:
    """The median of a row's repeats."""
    return 1e3 * median(row["seconds"])


def algorithm_bandwidth(row: Row) -> float:
    """GB (10^9 bytes) of the message a second."""
    return float(row["num_bytes"]) / median(row["seconds"]) / 1e9


def size_text(num_bytes: int) -> str:
    """A power of two with its unit."""
    unit, name = next(item for item in UNITS if num_bytes >= item[0])
    return f"{num_bytes // unit} {name}"


def to_markdown(record: Record) -> str:
    """The whole page."""
    setting = record.setting
    num_nodes = setting["num_nodes"]
    nodes = "1 machine" if num_nodes == 1 else f"{num_nodes} machines"
    return "\n".join(
        [
            "# Communication\n",
            wrapped(INTRODUCTION.format(**setting, nodes=nodes)) + "\n",
            wrapped(provenance(record)) + "\n",
            "## Collectives\n",
            wrapped(COLLECTIVES) + "\n",
            _collectives(record),
            *(_steps(record) if step_rows(record) else ()),
        ]
    )


def step_rows(record: Record) -> list[Row]:
    """The rows of steps, smaller buckets first."""
    strategies = record.setting["strategies"]

    def place(row: Row) -> tuple[int, int, float]:
        when = COMMUNICATION.index(row["communication"])
        return strategies.index(row["strategy"]), when, row["bucket_mib"] or 0.0

    return sorted((row for row in record.rows if row["kind"] == "step"), key=place)


def _collectives(record: Record) -> str:
    world_size = record.setting["world_size"]

    def bus(row: Row) -> float:
        return algorithm_bandwidth(row) * bus_factor(row["collective"], world_size)

    columns = [
        Column("collective", lambda row: row["collective"], is_number=False),
        Column("type", lambda row: row["dtype"], is_number=False),
        Column("size", lambda row: size_text(row["num_bytes"])),
        Column("ms", lambda row: f"{milliseconds(row):.3f}"),
        Column("algorithm GB/s", lambda row: f"{algorithm_bandwidth(row):.2f}"),
        Column("bus GB/s", lambda row: f"{bus(row):.2f}"),
    ]
    return table(columns, [row for row in record.rows if row["kind"] == "collective"])


def _steps(record: Record) -> list[str]:
    rows = step_rows(record)
    num_samples = record.setting["micro_batch_size"]
    batch = "1 sample" if num_samples == 1 else f"{num_samples} samples"
    none = {row["strategy"]: row["seconds"] for row in rows if row["communication"] == "none"}
    rows = [{**row, **_exposed(row, none.get(row["strategy"]))} for row in rows]
    columns = [
        Column("strategy", lambda row: row["strategy"], is_number=False),
        Column("communication", lambda row: row["communication"], is_number=False),
        Column("bucket MiB", lambda row: number(row["bucket_mib"], "g")),
        Column("ms a step", lambda row: f"{milliseconds(row):.1f}"),
        Column("from", lambda row: f"{1e3 * min(row['seconds']):.1f}"),
        Column("to", lambda row: f"{1e3 * max(row['seconds']):.1f}"),
        Column("exposed ms", lambda row: number(row["exposed"], ".1f")),
        Column("of the step", lambda row: number(row["share"], ".1%")),
    ]
    return [
        "## What a step waits for\n",
        wrapped(STEPS.format(**record.setting, batch=batch)) + "\n",
        table(columns, rows),
        wrapped(READING + (ON_CPUS if record.setting["backend"] == "gloo" else "")) + "\n",
    ]


def _exposed(row: Row, without: list[float] | None) -> dict[str, float | None]:
    """What communication adds to a step: milliseconds and share; None where no step was without it."""
    if row["communication"] == "none" or without is None:
        return {"exposed": None, "share": None}
    found = 1e3 * median(mine - other for mine, other in zip(row["seconds"], without, strict=True))
    return {"exposed": found, "share": found / milliseconds(row)}
