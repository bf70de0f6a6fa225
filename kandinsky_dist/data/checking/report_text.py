"""A corpus report's figures as tables, for terminals and for Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

SPREAD = ("mean", "min", "p5", "p50", "p95", "max")


@dataclass(frozen=True)
class TextTable:
    """Rows of words under a header; the first column is to the left, the others to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def aspect_name(aspect: float) -> str:
    """Width to height in small numbers, as in 16:9."""
    ratio = Fraction(aspect).limit_denominator(16)
    return f"{ratio.numerator}:{ratio.denominator}"


def tables_of(figures: Mapping[str, Any]) -> list[TextTable]:
    """Tables of a report's figures."""
    return [
        TextTable(("corpus", ""), tuple(_corpus(figures))),
        TextTable(("figure", *SPREAD), tuple(_spreads(figures))),
        TextTable(("aspect (width:height)", "images", "share"), tuple(_aspects(figures))),
        TextTable(("check", ""), tuple(_checks(figures))),
    ]


def to_text(tables: Sequence[TextTable]) -> str:
    """Tables for a terminal."""
    return "\n\n".join(_aligned(table) for table in tables) + "\n"


def to_markdown(title: str, tables: Sequence[TextTable]) -> str:
    """Tables under a title, in Markdown."""
    parts = [f"# {title}"]
    for table in tables:
        rows = [table.header, (":--", *("--:",) * (len(table.header) - 1)), *table.rows]
        parts.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def _aligned(table: TextTable) -> str:
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    if len(widths) == 2:
        return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]}".rstrip() for row in rows)
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    return "\n".join(lines)


def _corpus(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "samples", f"{figures['num_samples']:,}"
    yield "shards", f"{figures['num_shards']:,}, {_size(figures['num_bytes'])}"
    yield "fingerprint", figures["fingerprint"][:16]
    members = figures["num_members"]
    yield "samples with", ", ".join(f".{name} {count:,}" for name, count in members.items()) or "nothing"
    left_out = figures["num_left_out_by_indexing"]
    if sum(left_out.values()):
        words = ", ".join(f"{count:,} without {name}" for name, count in left_out.items() if count)
        yield "left out by indexing", f"{words}, first {figures['first_left_out_by_indexing']}"
    else:
        yield "left out by indexing", "none"


def _spreads(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rows = (
        ("image file, KiB", "image_file_bytes", 1024),
        ("shorter side, pixels", "image_short_side_pixels", 1),
        ("longer side, pixels", "image_long_side_pixels", 1),
        ("caption, bytes", "caption_bytes", 1),
        ("caption, characters (of those read)", "caption_characters", 1),
        ("caption, tokens (of those read)", "caption_tokens", 1),
    )
    for label, name, unit in rows:
        spread = figures.get(name)
        if spread and spread["count"]:
            whole = unit == 1
            numbers = [spread[key] / unit for key in SPREAD]
            yield (
                label,
                *(
                    f"{number:,.0f}" if whole and key != "mean" else f"{number:,.1f}"
                    for key, number in zip(SPREAD, numbers, strict=True)
                ),
            )


def _aspects(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    counts = figures["num_samples_by_aspect"]
    total = max(1, sum(counts.values()))
    for name, count in counts.items():
        yield name, f"{count:,}", f"{count / total:.1%}"
    if figures["num_images_of_unknown_size"]:
        yield "unknown", f"{figures['num_images_of_unknown_size']:,}", ""


def _checks(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = figures["image_short_side_pixels"]["count"]
    if known:
        small = figures["num_images_smaller_than_resolution"]
        label = f"images with a side under {figures['resolution_pixels']} pixels"
        yield label, f"{small:,} ({small / known:.1%})"
    for kind in ("images", "captions"):
        yield f"repeated {kind}", _repeats(figures, kind)
    yield "empty captions (of those read)", f"{figures['num_empty_captions']:,}"
    if "caption_tokens" in figures:
        yield (
            "captions above 77 tokens (of those read)",
            f"{figures['share_of_captions_above_77_tokens']:.1%}",
        )
    yield (
        "shards that are not what was indexed",
        _named(figures["num_disagreeing_shards"], figures["first_disagreeing_shards"]),
    )
    yield "samples read", f"{figures['num_read']:,} of {figures['num_samples']:,}"
    yield "unreadable", f"{figures['num_unreadable']:,}"
    for reason, trouble in figures["unreadable"].items():
        names = [f"{sample['shard']}:{sample['key']}" for sample in trouble["first"]]
        yield f"  {reason}", _named(trouble["num_samples"], names)
    seconds = figures["estimated_epoch_seconds"]
    if seconds is not None:
        yield (
            "estimate: one epoch, read and decoded",
            f"{_duration(seconds)} by {figures['num_processes']} processes, at the "
            f"{figures['read_samples_per_second_per_process']:,.0f} samples/s a process measured here",
        )


def _repeats(figures: Mapping[str, Any], kind: str) -> str:
    found = figures[f"repeated_{kind}"]
    if not found["num_compared"]:
        return "unknown: index with --checksums"
    basis = f"{found['num_compared']:,} compared by CRC-32 and size"
    if figures["compared_one_in"] > 1:
        basis += f", one kind in {figures['compared_one_in']}"
    largest = f", at most {found['most_alike']:,} alike" if found["num_repeated"] else ""
    return f"{found['num_repeated']:,} ({found['share']:.1%}){largest}; {basis}"


def _named(count: int, names: Sequence[str]) -> str:
    if not count:
        return "0"
    return f"{count:,}: {', '.join(names)}{', ...' if count > len(names) else ''}"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def _duration(seconds: float) -> str:
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:,.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"
