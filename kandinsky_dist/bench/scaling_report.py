"""The record of `bench scaling` as a page and a picture. All figures come from the record."""

import io
from collections.abc import Sequence
from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table, wrapped
from kandinsky_dist.bench.train_report import DASH, Row, count, exposed_seconds, how, ratio, stages_of
from kandinsky_dist.optional import require

OWN_DEVICES = """
Every rank has a GPU, or without GPUs as many cores, of its own: **efficiency** is the rate over that of
{fewest} times the ratio of ranks.
"""
SHARED_CORES = """
There are more ranks than cores, and they share them: more ranks cannot be faster here, and **efficiency** is
the rate over that of {fewest}. It shows what dividing the work costs, not how it scales.
"""
READING = """\
- **weak**: each rank has the same micro-batch, the global batch grows with the ranks. **strong**: the global
  batch stays, and ranks share its micro-batches.
- **communication** is what a step waits for it, in milliseconds: the step less the same step with gradients
  left unreduced. ddp alone can leave them so.
"""
COLOURS = ("#4477aa", "#cc3311", "#228833", "#ccbb44", "#aa3377", "#66ccee")
LINES = {"weak": "-", "strong": "--"}


def efficiency(row: Row, first: Row, *, shares_cores: bool) -> float | None:
    """Rate over what perfect scaling from the first row would give; None where nothing was measured."""
    times = ratio(row, first)
    if times is None:
        return None
    return times if shares_cores else times * first["world_size"] / row["world_size"]


def lines_of(record: Record) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by stage, strategy and kind of scaling, by rising number of ranks."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in record.rows:
        found.setdefault((row["stage"], row["strategy"], row["mode"]), []).append(row)
    return found


def scaling_table(record: Record, stage: str) -> str:
    """One stage's rows."""
    shares = record.setting["shares_cores"]
    rows = [(row, line[0]) for (name, *_), line in lines_of(record).items() if name == stage for row in line]

    def of(pair: tuple[Row, Row]) -> str:
        value = efficiency(*pair, shares_cores=shares)
        return DASH if value is None else f"{value:.1%}"

    def rate(row: Row) -> str:
        return f"{row['samples_per_second']:,.2f}" if row["step_seconds"] else DASH

    def waits(row: Row) -> str:
        seconds = exposed_seconds(row)
        return DASH if seconds is None else f"{1e3 * seconds:,.1f}"

    columns = [
        Column("strategy", lambda pair: pair[0]["strategy"], is_number=False),
        Column("scaling", lambda pair: pair[0]["mode"], is_number=False),
        Column("ranks", lambda pair: str(pair[0]["world_size"])),
        Column("global batch", lambda pair: str(pair[0]["global_batch_size"])),
        Column("samples/s", lambda pair: rate(pair[0])),
        Column("efficiency", of),
        Column("communication", lambda pair: waits(pair[0])),
        Column("remark", lambda pair: pair[0]["note"], is_number=False),
    ]
    return table(columns, rows)


def reading(record: Record) -> str:
    """What the columns mean on this hardware."""
    fewest = min(row["world_size"] for row in record.rows)
    words = count(fewest, "rank")
    text = SHARED_CORES if record.setting["shares_cores"] else OWN_DEVICES
    return wrapped(text.format(fewest=words)) + "\n\n" + READING


def to_markdown(record: Record) -> str:
    """The whole page."""
    parts = ["# Scaling\n", wrapped(provenance(record)) + "\n", wrapped(how(record)) + "\n"]
    for stage in stages_of(record):
        parts += [f"## The {stage}\n", scaling_table(record, stage)]
    return "\n".join([*parts, "## How to read it\n", reading(record)])


def draw(record: Record) -> bytes:
    """A PNG with samples a second over ranks, a diagram for each stage."""
    require("matplotlib", extra="report", why="the picture of bench scaling")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = stages_of(record)
    figure = Figure(figsize=(6.5 * len(stages), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed, nor pyplot's global state
    figure.suptitle(record.device, x=0.01, ha="left", fontsize="medium", parse_math=False)
    for stage, axes in zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True):
        lines = {key: line for key, line in lines_of(record).items() if key[0] == stage}
        strategies = list(dict.fromkeys(strategy for _, strategy, _ in lines))
        for (_, strategy, mode), line in lines.items():
            _line(axes, line, f"{strategy}, {mode}", COLOURS[strategies.index(strategy) % 6], LINES[mode])
        axes.set(xlabel="ranks", ylabel="samples a second", title=f"the {stage}", ylim=(0, None))
        axes.grid(color="#dddddd")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _line(axes: Any, line: Sequence[Row], label: str, colour: str, style: str) -> None:
    rows = [row for row in line if row["step_seconds"]]
    ranks = [row["world_size"] for row in rows]
    axes.plot(
        ranks, [row["samples_per_second"] for row in rows], style, color=colour, marker=".", label=label
    )
    axes.set_xticks(sorted({*axes.get_xticks(), *ranks} & set(ranks)))
