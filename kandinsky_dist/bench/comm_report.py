"""What `bench comm` measured, as Markdown. All figures come from the record."""

from statistics import median
from typing import Any

from kandinsky_dist.bench.collectives import bus_factor
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table, wrapped

Row = dict[str, Any]
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
{precision}) with {batch} a rank and buckets of {bucket_mib:g} MiB. *Not overlapped*: ddp reduces all
gradients in one bucket after backward, in ZeRO backward waits for every bucket. *None* leaves gradients
unreduced (`no_sync`); ZeRO cannot step without reducing them, so it has no such row.
"""
EXPOSED = """
Under ddp **{exposed:.1f} ms** of a step are communication that nothing hides: {overlapped:.1f} ms less the
{none:.1f} ms without any. Not overlapped it costs {whole:.1f} ms, of which overlap hides {hidden:.0f} %.
"""
IN_NOISE = """
Under ddp the medians are not in the order that communication has (none, overlapped, not overlapped): what it
costs here is less than the machine's noise.
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
            *(_steps(record) if _of_kind(record, "step") else ()),
        ]
    )


def _of_kind(record: Record, kind: str) -> list[Row]:
    return [row for row in record.rows if row["kind"] == kind]


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
    return table(columns, _of_kind(record, "collective"))


def _steps(record: Record) -> list[str]:
    rows = _of_kind(record, "step")
    num_samples = record.setting["micro_batch_size"]
    batch = "1 sample" if num_samples == 1 else f"{num_samples} samples"
    columns = [
        Column("strategy", lambda row: row["strategy"], is_number=False),
        Column("communication", lambda row: row["communication"], is_number=False),
        Column("ms a step", lambda row: f"{milliseconds(row):.1f}"),
        Column("from", lambda row: f"{1e3 * min(row['seconds']):.1f}"),
        Column("to", lambda row: f"{1e3 * max(row['seconds']):.1f}"),
    ]
    parts = [
        "## What a step waits for\n",
        wrapped(STEPS.format(**record.setting, batch=batch)) + "\n",
        table(columns, rows),
    ]
    times = {row["communication"]: milliseconds(row) for row in rows if row["strategy"] == "ddp"}
    if times:
        parts.append(_exposed(times["overlapped"], times["not overlapped"], times["none"]))
    return parts


def _exposed(overlapped: float, not_overlapped: float, none: float) -> str:
    if not none <= overlapped <= not_overlapped or none == not_overlapped:
        return wrapped(IN_NOISE) + "\n"
    figures = {
        "exposed": overlapped - none,
        "overlapped": overlapped,
        "none": none,
        "whole": not_overlapped - none,
        "hidden": 100 * (not_overlapped - overlapped) / (not_overlapped - none),
    }
    return wrapped(EXPOSED.format(**figures)) + "\n"
