"""The record of `bench data` as a page."""

from typing import Any

from kandinsky_dist.bench.data_contenders import BARE_PREAD, BARE_PREAD_HELD, OURS, USUAL_LOOP
from kandinsky_dist.bench.data_rivals import WEBDATASET
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table

HEADINGS = {
    "cached": "Encoder outputs (fixed-size records)",
    "jpeg": "Photographs to both views",
    "remote": "Shards over the network",
}
COLUMNS = [
    Column("loader", lambda row: row["contender"], is_number=False),
    Column("workers", lambda row: str(row["num_workers"])),
    Column("samples/s", lambda row: f"{row['samples_per_second']:,.0f}" if row["repeats"] else "-"),
    Column("from", lambda row: f"{min(row['repeats']):,.0f}" if row["repeats"] else "-"),
    Column("to", lambda row: f"{max(row['repeats']):,.0f}" if row["repeats"] else "-"),
    Column("busy cores", lambda row: f"{row['busy_cores']:.1f}" if row["repeats"] else "-"),
    Column("remark", lambda row: _remark(row), is_number=False),
]


def to_markdown(record: Record) -> str:
    """Tables by form of samples, and the ratios that matter, from the record alone."""
    parts = ["# Loader throughput\n", provenance(record) + "\n", _how(record)]
    for form in dict.fromkeys(row["form"] for row in record.rows):
        rows = [row for row in record.rows if row["form"] == form]
        parts += [f"## {HEADINGS[form]}\n", table(COLUMNS, rows), *_ratios(form, rows)]
    return "\n".join(parts)


def _how(record: Record) -> str:
    setting = record.setting
    sizes = ", ".join(f"{form} {size}" for form, size in setting["batch_sizes"].items())
    numbers = ", ".join(f"{form} {number:,}" for form, number in setting["num_samples"].items())
    return (
        f"Medians of {setting['num_repeats']} repeats of {setting['seconds']:g} s, each in a process of its "
        f"own, all loaders in turn; batches: {sizes}; samples: {numbers}; files in the page cache. "
        f"Workers are processes, for ours threads.{_network(setting)}\n"
    )


def _network(setting: dict[str, Any]) -> str:
    if "first_byte_ms" not in setting:
        return ""
    return (
        f" The corpus has {setting['corpus_mib']:,} MiB, {setting['read_ahead_mib']:,} are read ahead; "
        f"one byte comes from the server in {setting['first_byte_ms']:g} ms."
    )


def _ratios(form: str, rows: list[dict[str, Any]]) -> list[str]:
    def best(name: str, *, num_workers: int | None = None) -> float:
        rates = [
            row["samples_per_second"]
            for row in rows
            if row["contender"] == name and num_workers in (None, row["num_workers"])
        ]
        return max(rates, default=0.0)

    sealed = f"{OURS}, sealed records"
    comparisons: dict[str, list[tuple[str, str, int | None, str]]] = {
        "cached": [
            ("the bare reads of the same bytes", sealed, None, BARE_PREAD),
            ("the bare reads, a batch held while the next is read", sealed, None, BARE_PREAD_HELD),
            ("webdataset with decoding, each at its best", sealed, None, WEBDATASET),
            ("webdataset on our shards, undecoded", sealed, None, f"{WEBDATASET}, our shards"),
            ("mosaicml-streaming, each at its best", sealed, None, "mosaicml-streaming"),
            ("litdata, each at its best", sealed, None, "litdata"),
            ("megatron-energon, each at its best", sealed, None, "megatron-energon"),
        ],
        "jpeg": [
            ("PIL + CLIPImageProcessor, each in one thread", OURS, 0, USUAL_LOOP),
            ("webdataset, each at its best", OURS, None, WEBDATASET),
            ("mosaicml-streaming, each at its best", OURS, None, "mosaicml-streaming"),
            ("litdata, each at its best", OURS, None, "litdata"),
            ("megatron-energon, each at its best", OURS, None, "megatron-energon"),
        ],
        "remote": [("the same shards on a local disk", "remote", None, "local")],
    }
    lines = []
    for against, ours, num_workers, theirs in comparisons[form]:
        mine, other = best(ours, num_workers=num_workers), best(theirs, num_workers=num_workers)
        if mine and other:
            lines.append(f"- {mine / other:.2f} times {against}")
    return ["Ours against:\n", "\n".join(lines) + "\n"] if lines else []


def _remark(row: dict[str, Any]) -> str:
    if row["note"] == "not installed" and row["install"]:
        return f"not installed: pip install {row['install']}"
    return str(row["note"])
