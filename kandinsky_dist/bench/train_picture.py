"""The picture of `bench train`: samples a second by case, and what a step is made of."""

import io
from statistics import median
from typing import Any

from kandinsky_dist.bench.parts import PARTS
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.train_report import ratio, stages_of
from kandinsky_dist.optional import require

COLOURS = {"incumbent": "#bbbbbb", "ours": "#4477aa"}
PART_COLOURS = ("#ccbb44", "#aa3377", "#4477aa", "#66ccee", "#228833", "#ee6677", "#bbbbbb")
GRID_COLOUR = "#dddddd"


def require_matplotlib() -> Any:
    """matplotlib, or one line that says how to get it."""
    return require("matplotlib", extra="report", why="the picture of bench train")


def draw(record: Record) -> bytes:
    """A PNG with a row of two diagrams for each stage."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = stages_of(record)
    rows = {
        stage: [row for row in record.rows if row["stage"] == stage and row["step_seconds"]]
        for stage in stages
    }
    height = sum(1.2 + 0.36 * len(found) for found in rows.values())
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed, nor pyplot's global state
    figure.suptitle(record.device, x=0.01, ha="left", fontsize="medium", parse_math=False)
    heights = [1.2 + 0.36 * len(found) for found in rows.values()]
    axes = figure.subplots(len(stages), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (stage, found), (left, right) in zip(rows.items(), axes, strict=True):
        if found:
            _rates(left, stage, found)
            _parts(right, found)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _rates(axes: Any, stage: str, rows: list[dict[str, Any]]) -> None:
    places = list(range(len(rows)))
    rates = [row["samples_per_second"] for row in rows]
    axes.barh(places, rates, color=[COLOURS[row["way"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        times = ratio(row, rows[0])
        if times is not None:
            axes.text(rates[place], place, f" {times:.2f}x", va="center", fontsize="small")
    axes.set_yticks(places, [row["case"] for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="samples a second", title=f"the {stage}")
    axes.grid(axis="x", color=GRID_COLOUR)
    axes.set_axisbelow(True)


def _parts(axes: Any, rows: list[dict[str, Any]]) -> None:
    places = list(range(len(rows)))
    starts = [0.0] * len(rows)
    for part, colour in zip((*PARTS, "rest"), PART_COLOURS, strict=True):
        widths = [_milliseconds(row, part) for row in rows]
        axes.barh(places, widths, left=starts, color=colour, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(places, [""] * len(rows))
    axes.invert_yaxis()
    axes.set(xlabel="a step (ms)")
    axes.grid(axis="x", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", ncols=4)


def _milliseconds(row: dict[str, Any], part: str) -> float:
    if part == "rest":
        rest = median(row["step_seconds"]) - sum(row["parts"].values())
        return 1e3 * max(0.0, rest)
    return float(1e3 * row["parts"][part])
