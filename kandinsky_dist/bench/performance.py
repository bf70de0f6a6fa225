"""The page of documentation about throughput: what a folder of records renders, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from kandinsky_dist.bench import aims, scaling_report, train_report
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import provenance, wrapped
from kandinsky_dist.bench.train_report import Row, ratio, ratios, stages_of, step_up

NO_GAIN = 1.02
"""A lever that makes a step less than this times as fast has not helped."""

INTRODUCTION = """\
How many samples a second training takes in, beside the way in which diffusers' example scripts do the same
step; what each lever is worth; where the time of a step goes. Every figure and ratio on this page is
rendered from a record in [records/performance](records/performance) by `kandinsky-dist bench render
docs/records/performance`.
"""
INCUMBENT = """\
**The incumbent's way** is a baseline that trains the same weights on the same samples in the same batch and
arithmetic: all frozen encoders run in every step, captions are padded to 77 tokens, Pillow and
CLIPImageProcessor prepare the pictures in the training process, AdamW is not fused, each micro-batch's loss
is gathered and read by the host twice, nothing is compiled, accelerate runs the loop. Its first step has
the noise and timesteps of ours, and a test holds the two losses equal. Guidance dropout is off on both
sides.

**Ours** is the trainer itself: its own loop, made to wait between two steps while another case has its
turn. Each case is in processes of its own. All cases have a turn before any has its next, so that a machine
that slows down does so for all; a ratio compares turns of the same round. Only checkpoints and log entries
are left out.
"""
NOTHING_YET = """\
No record is here yet. The commands below make some.
"""
AIMS_READING = """\
Of the fastest kept case of each kind. **The peak** is the GPU's published rate of dense bf16 products; the
share of it is that of FLOPs really done.
"""
HOW_TO_RUN = """\
The whole suite for a machine without a GPU; 2 idle cores are enough, and each record says how long it took:

```bash
pip install -e '.[report]'
kandinsky-dist bench suite OUT
kandinsky-dist bench render OUT        # prints this page, from OUT's records
```

It is `bench train OUT --size small` and `bench scaling OUT --size tiny --stage prior`. On a machine with
GPUs, `kandinsky-dist bench suite OUT --size full` measures the published shapes, with random weights, which
time as trained ones do; under Slurm: `sbatch --gpus-per-node 8 --exclusive slurm/bench.sbatch OUT`.

Any setting can be compared with any other, on networks and shards of your own:

```bash
kandinsky-dist bench train OUT --stage decoder --models MODELS --shards SHARDS \\
  --vary parallel.strategy ddp zero2 --vary data.micro_batch_size 8 16 --parallel.precision bf16
```

A record to be published goes to `docs/records/performance/`, under any name; then the command above renders
this page.
"""


def to_markdown(folder: Path) -> str:
    """The page of a folder's records; those of `bench train` and `bench scaling` count.

    Raises:
        DataError: a file there is no record.
    """
    records = {path: Record.load(path) for path in sorted(folder.glob("*.json"))}
    trained = {path: record for path, record in records.items() if record.case == "train"}
    scaled = {path: record for path, record in records.items() if record.case == "scaling"}
    parts = ["# Performance\n", INTRODUCTION, "## What is compared\n", INCUMBENT]
    if not trained and not scaled:
        parts.append(NOTHING_YET)
    for path, record in trained.items():
        parts += _train(path, record)
    if trained:
        parts += ["## Aims\n", AIMS_READING, aims.to_markdown(list(trained.values()))]
    parts += _without_gain([record for record in trained.values() if record.setting["has_ladder"]])
    for path, record in scaled.items():
        parts += _scaling(path, record)
    if trained or scaled:
        parts += [
            "## How to read it\n",
            train_report.LADDER_READING,
            wrapped(train_report.PARTS_READING) + "\n",
        ]
    return "\n".join([*parts, "## How to run it\n", HOW_TO_RUN])


def _train(path: Path, record: Record) -> list[str]:
    kind = "The ladder" if record.setting["has_ladder"] else "Cases"
    parts = [
        f"## {kind} on {record.device}\n",
        wrapped(provenance(record)) + "\n",
        wrapped(train_report.how(record)) + "\n",
        *_picture(path),
    ]
    for stage in stages_of(record):
        rows = [row for row in record.rows if row["stage"] == stage]
        parts += [
            f"### The {stage}, networks of size {record.setting['size']}\n",
            wrapped(train_report.about_batch(rows)) + "\n",
            train_report.cases_table(rows),
            *_levers(rows),
            "Where a step's time goes:\n",
            train_report.parts_table(rows),
        ]
    missing = train_report.left_out(record)
    return [*parts, missing] if missing else parts


def _picture(path: Path) -> list[str]:
    """The record's picture, where it lies beside it: seen from docs/, or from its own folder."""
    picture = path.with_suffix(".png")
    is_published = picture.parent.parts[-2:] == ("records", "performance")
    link = f"records/performance/{picture.name}" if is_published else picture.name
    return [f"![Samples a second]({link})\n"] if picture.is_file() else []


def _levers(rows: Sequence[Row]) -> list[str]:
    """What each rung does."""
    lines = [wrapped(f"**{row['case']}**: {row['why']}.", bullet="- ") for row in rows if row.get("why")]
    return ["\n".join(lines) + "\n"] if lines else []


def _without_gain(records: Sequence[Record]) -> list[str]:
    bullets = []
    for record in records:
        for stage in stages_of(record):
            rows = [row for row in record.rows if row["stage"] == stage]
            for row in rows:
                gain = step_up(row, rows)
                if gain is None or gain >= NO_GAIN:
                    continue
                found = [value / (ratio(row, rows[0]) or 1.0) * gain for value in ratios(row, rows[0])]
                bullets.append(
                    wrapped(
                        f"**{row['case']}** ({stage}, size {record.setting['size']}, {record.device}): "
                        f"{gain:.2f} times the rate of what it was added to, {row['added_to']} "
                        f"({min(found):.2f} to {max(found):.2f} by round). {_sentence(row)}",
                        bullet="- ",
                    )
                )
    return ["## What did not help\n", "\n".join(bullets) + "\n"] if bullets else []


def _sentence(row: Row) -> str:
    text = str(row.get("why", ""))
    return f"What it does: {text}." if text else ""


def _scaling(path: Path, record: Record) -> list[str]:
    parts = [
        f"## Scaling on {record.device}\n",
        wrapped(provenance(record)) + "\n",
        wrapped(train_report.how(record)) + "\n",
        *_picture(path),
    ]
    for stage in stages_of(record):
        parts += [f"### The {stage}\n", scaling_report.scaling_table(record, stage)]
    return [*parts, scaling_report.reading(record)]
