"""Markdown from records. Figures reach the documentation through here and are never typed."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kandinsky_dist.bench.record import Record

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A heading and how a row's cell is written; numbers stand on the right."""

    heading: str
    cell: Callable[[Any], str]
    is_number: bool = True


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """A Markdown table, aligned to be read as plain text too."""
    cells = [[column.heading for column in columns]]
    cells += [[column.cell(row) for column in columns] for row in rows]
    widths = [max(3, *(len(line[index]) for line in cells)) for index in range(len(columns))]
    lines = [
        [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        for line in cells
    ]
    rule = [
        "-" * (width - 1) + ":" if column.is_number else "-" * width
        for width, column in zip(widths, columns, strict=True)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def mib(num_bytes: float | None) -> str:
    """Bytes as MiB with one decimal; a dash where nothing was measured."""
    return "-" if num_bytes is None else f"{num_bytes / MIB:,.1f}"


def number(value: float | None, form: str) -> str:
    """A figure in the given format; a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def percent(share: float) -> str:
    """A signed share in percent with one decimal."""
    return f"{100 * share:+.1f} %"


def provenance(record: Record) -> str:
    """Where the figures come from, in one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"Measured {record.date} on {record.device} ({versions}) by `{record.command}`."


def wrapped(text: str, *, bullet: str = "") -> str:
    """A paragraph in lines of the documentation's width."""
    return textwrap.fill(
        " ".join(text.split()),
        width=116,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
