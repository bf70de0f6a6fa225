"""The table of `bench gpu`, and the main figure of each record in it."""

from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table, wrapped
from kandinsky_dist.bench.train_report import ratio


def figure_of(record: Record) -> tuple[bool, str]:
    """Return whether a step's record is complete, and its main figure or what is wrong."""
    if record.case == "train":
        return _training(record.rows)
    figures = [
        f"{row['stage']} {row['measured_gib']:.1f} GiB measured, {row['estimated_gib']:.1f} estimated"
        for row in record.rows
    ]
    return True, "; ".join(figures)


def _training(rows: list[dict[str, Any]]) -> tuple[bool, str]:
    for row in rows:
        if row["note"] or not row["step_seconds"]:
            return False, f"{row['case']}: {row['note'] or 'no step was measured'}"
    baseline, *_, ours = rows
    parts = [f"{ours['samples_per_second']:,.1f} samples/s", f"{ratio(ours, baseline):.2f} x baseline"]
    if ours.get("mfu"):
        parts.append(f"{ours['mfu']:.1%} of peak")
    return True, ", ".join([*parts, f"{ours['peak_memory_gib']:.1f} GiB"])


def steps_table(record: Record) -> str:
    """Return the table of all steps."""
    columns = [
        Column("step", lambda row: row["name"], is_number=False),
        Column("outcome", lambda row: row["verdict"], is_number=False),
        Column("seconds", lambda row: f"{row['seconds']:.0f}"),
        Column("figure or reason", lambda row: row["note"].replace("|", "/"), is_number=False),
    ]
    return table(columns, record.rows)


def to_markdown(record: Record) -> str:
    """Return the page of a record."""
    return f"# One GPU, {record.setting['minutes']:g} minutes\n\n{wrapped(provenance(record))}\n\n" + (
        steps_table(record)
    )
