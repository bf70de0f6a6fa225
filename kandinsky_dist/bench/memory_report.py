"""What `bench memory` measured, as Markdown. All figures come from the record."""

from collections.abc import Sequence
from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, mib, percent, provenance, table, wrapped
from kandinsky_dist.estimate.textbook import States, bytes_per_parameter

AT_REST = ("accumulating", "before the step")
"""Moments at which the textbook's states are alive; in the step temporary tensors come on top."""

SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
FORMULAS = (
    ("ddp, zero0", "4 + 4 + 8", "4 + 4 + 8"),
    ("fsdp2", "4 + (4 + 8) / N", "4 + (4 + 8) / N"),
    ("zero1", "2 + 2 + (4 + 8) / N", "4 + 4 + (4 + 8) / N"),
    ("zero2", "2 + (2 + 4 + 8) / N", "4 + (4 + 4 + 8) / N"),
    ("zero3", "(2 + 2 + 4 + 8) / N", "(4 + 4 + 4 + 8) / N"),
)
"""`textbook.bytes_per_parameter` in words."""

INTRODUCTION = """
Bytes of living tensor storages of one rank out of {world_size}, in MiB, and beside them the formulas of
[ZeRO](https://arxiv.org/abs/1910.02054), section 3.1. Networks of `--size {size}` with random weights.
"""
NOTES = """
**Result.** Under fsdp2, zero1, zero2 and zero3 no measured total is further than {worst} % from its formula.

**Counting.** Every storage once, in the first class that fits: `weights` are what the network computes
with, `masters` the fp32 copy that AdamW updates, `moments` AdamW's two. A row is the rank that holds most.
The figures below are the {stage}'s.

**fp32.** The paper's 12 bytes of optimizer states are for mixed precision. DeepSpeed keeps the master copy
beside fp32 weights too ({master} under zero1), so the fp32 formulas have it.

**ddp, zero0** keep no master copy in either precision (measured: {no_master}). Under bf16 they hold fp32
weights and gradients and autocast: 4 + 4 + 8, the same sum as the paper's 2 + 2 + 4 + 8.

**fsdp2** holds the gradients of all weights while it accumulates ({accumulating_fsdp} in bf16); after the
last micro-batch's reduction it keeps its share ({reduced_fsdp}).

**zero1** holds the gradients of all weights only while it accumulates ({accumulating} in bf16); after the
last reduction it keeps its share ({reduced}).

**zero2** has room for the whole gradient of a weight that straddles two ranks' shares, on both:
{straddling} over the formula in fp32.

**zero3** keeps weights below `stage3_param_persistence_threshold` (in `ds_configs/zero3.json`: 100,000
elements) whole on every rank, beside their shares, once it has gone through the network: {persistent} over
the formula in fp32. In a tiny network most weights are that small, and the formula does not hold.

**In the step** engines in bf16 replace their share of the gradients by an fp32 copy: {stepping_2} under
zero2. zero3 copies in both precisions and keeps what it copied: {stepping_3} together in bf16.

**buckets** are DeepSpeed's communication buffers. Their size is a setting (here
parallel.bucket_mib={bucket}), not a share of the model; zero2 frees them after each backward. ddp
communicates in the gradients' own memory.

**other** is all else that lives: the micro-batch, buffers, scalars. Activations, and weights that zero3
gathers for a layer, are gone at these moments: this is no peak.

**process** is a count by others, over what was there before the network: on a GPU torch's allocator, on a
CPU the process's anonymous resident memory, in which Python's objects and the libraries' workspaces are
too.
"""

Row = dict[str, Any]


def states(row: Row) -> States:
    """Measured bytes of model states."""
    return States(**{name: row[f"{name}_bytes"] for name in ("weights", "gradients", "masters", "moments")})


def textbook(row: Row, world_size: int) -> float:
    """Bytes that the formula gives for a row's network, strategy and precision."""
    formula = bytes_per_parameter(row["strategy"], row["precision"], world_size)
    return formula.total * float(row["num_parameters"])


def difference(row: Row, world_size: int) -> float:
    """Measured over textbook, less 1."""
    return states(row).total / textbook(row, world_size) - 1.0


def fullest(rows: Sequence[Row], moments: Sequence[str] = AT_REST) -> list[Row]:
    """Of each case the row with the most states over ranks and moments, cases in their order."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["moment"] in moments:
            case = (row["stage"], row["strategy"], row["precision"])
            found[case] = max(found.get(case, row), row, key=lambda item: states(item).total)
    return list(found.values())


def to_markdown(record: Record) -> str:
    """The whole page."""
    world_size = record.setting["world_size"]
    return "\n".join(
        [
            "# Memory of model states\n",
            wrapped(INTRODUCTION.format(world_size=world_size, size=record.setting["size"])) + "\n",
            wrapped(provenance(record)) + "\n",
            *(_network(record, stage) for stage in dict.fromkeys(row["stage"] for row in record.rows)),
            _notes(record),
        ]
    )


def _network(record: Record, stage: str) -> str:
    world_size = record.setting["world_size"]
    rows = [row for row in record.rows if row["stage"] == stage]
    num_parameters = rows[0]["num_parameters"]
    name = {"prior": "Prior", "decoder": "Decoder's U-Net"}[stage]
    case = [
        Column("strategy", lambda row: row["strategy"], is_number=False),
        Column("precision", lambda row: row["precision"], is_number=False),
    ]
    classes = [
        Column(heading, lambda row, key=f"{heading}_bytes": mib(row[key]))  # type: ignore[misc]
        for heading in ("weights", "gradients", "masters", "moments")
    ]
    total = Column("states", lambda row: mib(states(row).total))
    compared = table(
        [
            *case,
            *classes,
            total,
            Column("textbook", lambda row: mib(textbook(row, world_size))),
            Column("difference", lambda row: percent(difference(row, world_size))),
            Column("bytes/parameter", lambda row: f"{states(row).total / row['num_parameters']:.2f}"),
            Column("buckets", lambda row: mib(row["buckets_bytes"])),
            Column("other", lambda row: mib(row["other_bytes"])),
            Column("process", lambda row: mib(row["process_bytes"])),
        ],
        fullest(rows),
    )
    moments = tuple(dict.fromkeys(row["moment"] for row in rows))
    by_moment = table(
        [
            *case,
            *(
                Column(moment, lambda row, moment=moment: _gradients_and_states(rows, row, moment))  # type: ignore[misc]
                for moment in moments
            ),
        ],
        fullest(rows),
    )
    return (
        f"## {name}, {num_parameters:,} trained parameters\n\n"
        "At the fuller of two moments: after a step's first micro-batch, and after the last one's reduction."
        f"\n\n{compared}\n"
        f"Gradients / all states by moment, MiB:\n\n{by_moment}"
    )


def _gradients_and_states(rows: Sequence[Row], like: Row, moment: str) -> str:
    case = ("stage", "strategy", "precision")
    same = [row for row in rows if all(row[key] == like[key] for key in case)]
    (row,) = fullest(same, (moment,))
    return f"{mib(row['gradients_bytes'])} / {mib(states(row).total)}"


def _notes(record: Record) -> str:
    world_size, stage = record.setting["world_size"], record.rows[0]["stage"]
    worst = max(
        abs(difference(row, world_size)) for row in fullest(record.rows) if row["strategy"] in SHARDED
    )

    def row_of(strategy: str, precision: str, moments: Sequence[str] = AT_REST) -> Row:
        case = (stage, strategy, precision)
        same = [row for row in record.rows if (row["stage"], row["strategy"], row["precision"]) == case]
        return fullest(same, moments)[0]

    def held(strategy: str, precision: str, name: str, moments: Sequence[str] = AT_REST) -> str:
        return f"{mib(row_of(strategy, precision, moments)[f'{name}_bytes'])} MiB"

    def excess(strategy: str, precision: str, name: str) -> str:
        row, formula = row_of(strategy, precision), bytes_per_parameter(strategy, precision, world_size)
        return f"{mib(row[f'{name}_bytes'] - getattr(formula, name) * row['num_parameters'])} MiB"

    formulas = table(
        [
            Column("strategy", lambda row: row[0], is_number=False),
            Column("bf16", lambda row: row[1], is_number=False),
            Column("fp32", lambda row: row[2], is_number=False),
        ],
        FORMULAS,
    )
    figures = {
        "worst": f"{100 * worst:.1f}",
        "stage": stage,
        "master": held("zero1", "fp32", "masters"),
        "no_master": held("ddp", "bf16", "masters"),
        "accumulating_fsdp": held("fsdp2", "bf16", "gradients"),
        "reduced_fsdp": held("fsdp2", "bf16", "gradients", ["before the step"]),
        "accumulating": held("zero1", "bf16", "gradients"),
        "reduced": held("zero1", "bf16", "gradients", ["before the step"]),
        "straddling": excess("zero2", "fp32", "gradients"),
        "persistent": excess("zero3", "fp32", "weights"),
        "stepping_2": held("zero2", "bf16", "gradients", ["in the step"]),
        "stepping_3": held("zero3", "bf16", "gradients", ["in the step"]),
        "bucket": f"{record.setting['bucket_mib']:g}",
    }
    notes = [note.format(**figures) for note in NOTES.split("\n\n")]
    return (
        "## How to read it\n\n"
        "Bytes by parameter on one of N ranks, in the order weights, gradients, master copy, moments:\n\n"
        f"{formulas}\n" + "".join(f"{wrapped(note, bullet='- ')}\n" for note in notes)
    )
