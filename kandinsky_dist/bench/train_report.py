"""The record of `bench train` as a page. All figures come from the record."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from kandinsky_dist.bench.parts import PARTS
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, number, provenance, table, wrapped

Row = dict[str, Any]
DASH = "-"

HOW = """
Networks of `--size {size}` with random weights, {ranks}; all cases of a stage have the same samples,
weights and batch. Every case is a training of its own, in processes that stay, and the cases take turns:
medians of {turns} of {steps}, of up to {most} for cases that are faster than the first, after {warmup} to
warm up. A ratio is the median of those within each round. All of it, networks and corpus included, took
{minutes:.1f} minutes.
"""
CORPUS = """
The corpus: {num_samples} JPEG photographs of {photograph_size} px, captions of {mean_caption_tokens:.1f}
tokens in the mean and {longest_caption_tokens} at most.
"""
LADDER_READING = """\
- **times the first** and **times the one below** are ratios of samples a second; the range is that of the
  single rounds. A case that is no rung of the ladder, tried beside it, stands in parentheses.
- **GFLOP a sample** are counted, forward and backward and frozen networks, without recomputation.
- **loss** is that of the very first step, on the same samples with the same noise and weights. Cases that do
  the same work in the same arithmetic agree in it, as far as their pictures do: the decoder here shrinks a
  JPEG while it decodes it, Pillow afterwards.
"""
PARTS_READING = """\
Milliseconds of a step. On a GPU a part is timed on the device, data on the host; what runs beside something
else is counted in both, so the **rest** can be below 0. **Communication** is what a step waits for it, part
of backward: the step less the same step with gradients left unreduced.
"""


def samples_per_second(row: Row) -> list[float]:
    """Of each round."""
    return [row["global_batch_size"] / seconds for seconds in row["step_seconds"]]


def ratios(row: Row, first: Row) -> list[float]:
    """Samples a second over those of the first case, in each round in which both were measured."""
    batches = row["global_batch_size"] / first["global_batch_size"]
    pairs = zip(row["baseline_seconds"], row["step_seconds"], strict=True)
    return [batches * theirs / ours for theirs, ours in pairs if theirs is not None]


def ratio(row: Row, first: Row) -> float | None:
    """Their median; None where nothing was measured."""
    found = ratios(row, first)
    return median(found) if found else None


def step_up(row: Row, rows: Sequence[Row]) -> float | None:
    """Samples a second over those of the case that this one was added to."""
    below = next((other for other in rows if other["case"] == row["added_to"]), None)
    if below is None:
        return None
    mine, theirs = ratio(row, rows[0]), ratio(below, rows[0])
    return None if mine is None or theirs is None else mine / theirs


def exposed_seconds(row: Row) -> float | None:
    """What a step waits for communication; None where it was not measured."""
    if not row.get("silent_seconds") or not row.get("reduced_seconds"):
        return None
    return float(median(row["reduced_seconds"]) - median(row["silent_seconds"]))


def cases_table(rows: Sequence[Row]) -> str:
    """Samples a second and ratios of one stage's cases."""
    first = rows[0]

    def spread(row: Row) -> str:
        found = ratios(row, first)
        return f"{min(found):.2f} to {max(found):.2f}" if found else DASH

    columns = [
        Column("case", lambda row: f"({row['case']})" if row["is_beside"] else row["case"], is_number=False),
        Column("samples/s", lambda row: number(row.get("samples_per_second"), ",.2f")),
        Column("times the first", lambda row: number(ratio(row, first), ".2f")),
        Column("rounds", spread),
        Column("times the one below", lambda row: number(step_up(row, rows), ".2f")),
        Column("GFLOP a sample", lambda row: number(row.get("gflop_per_sample"), ",.1f")),
        Column("TFLOP/s a rank", lambda row: number(row.get("tflops_per_second"), ",.3f")),
    ]
    if any(row.get("mfu") for row in rows):
        columns.append(Column("MFU", lambda row: number(row.get("mfu"), ".1%")))
    columns += [
        Column("GiB", lambda row: number(row.get("peak_memory_gib"), ".1f")),
        Column("loss", lambda row: number(row.get("first_loss"), ".5f")),
    ]
    if any(row["note"] for row in rows):
        columns.append(Column("remark", lambda row: row["note"], is_number=False))
    return table(columns, rows)


def parts_table(rows: Sequence[Row]) -> str:
    """Where a step's time goes."""
    rows = [row for row in rows if row["step_seconds"]]

    def milliseconds(seconds: float | None) -> str:
        return DASH if seconds is None else f"{1e3 * seconds:,.1f}"

    def rest(row: Row) -> float:
        return float(median(row["step_seconds"]) - sum(row["parts"].values()))

    def of(part: str) -> Column:
        return Column(part, lambda row: milliseconds(row["parts"][part]))

    columns = [
        Column("case", lambda row: row["case"], is_number=False),
        Column("step", lambda row: milliseconds(median(row["step_seconds"]))),
        *map(of, PARTS),
        Column("rest", lambda row: milliseconds(rest(row))),
    ]
    if any(exposed_seconds(row) is not None for row in rows):
        columns.append(Column("communication", lambda row: milliseconds(exposed_seconds(row))))
    return table(columns, rows)


def how(record: Record) -> str:
    """What the rows have in common, in sentences."""
    setting = record.setting
    world_size = setting["world_size"]
    ranks = f"on {count(world_size, 'rank')}"
    text = HOW.format(
        size=setting["size"],
        ranks=ranks,
        turns=count(setting["num_repeats"], "turn"),
        steps=count(setting["num_steps"], "step"),
        most=setting["num_steps"] * setting["most_times"],
        warmup=count(setting["num_warmup"], "step"),
        minutes=setting["seconds"] / 60,
    )
    return text + (CORPUS.format(**setting["corpus"]) if setting["corpus"] else "")


def count(number: int, what: str) -> str:
    """So many, in words: "1 turn", "3 turns"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def stages_of(record: Record) -> list[str]:
    """Stages that the record has rows of."""
    return list(dict.fromkeys(row["stage"] for row in record.rows))


def about_batch(rows: Sequence[Row]) -> str:
    """The batch and arithmetic of a stage's cases."""
    batches = sorted({row["global_batch_size"] for row in rows})
    micros = sorted({row["micro_batch_size"] for row in rows})
    precisions = list(dict.fromkeys(row["precision"] for row in rows if "precision" in row))
    threads = sorted({row["threads_per_rank"] for row in rows if "threads_per_rank" in row})
    return (
        f"{_listed(batches)} samples a step in micro-batches of {_listed(micros)}, "
        f"{_listed(precisions)}, {_listed(threads)} threads a rank."
    )


def _listed(values: Sequence[Any]) -> str:
    return " and ".join(map(str, values))


def left_out(record: Record) -> str:
    """Rungs that this version could not be measured on."""
    names = record.setting.get("left_out") or []
    return "".join(f"- Left out: {name}.\n" for name in names)


def to_markdown(record: Record) -> str:
    """The whole page."""
    parts = ["# Throughput of training\n", wrapped(provenance(record)) + "\n", wrapped(how(record)) + "\n"]
    for stage in stages_of(record):
        rows = [row for row in record.rows if row["stage"] == stage]
        parts += [
            f"## The {stage}\n",
            wrapped(about_batch(rows)) + "\n",
            cases_table(rows),
            "### Where a step's time goes\n",
            parts_table(rows),
        ]
    parts += ["## How to read it\n", LADDER_READING, wrapped(PARTS_READING) + "\n"]
    if left_out(record):
        parts.append(left_out(record))
    return "\n".join(parts)
