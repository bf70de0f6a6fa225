"""The picture of `estimate`: samples a second over GPUs."""

import io
from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.optional import require

LINES = {"grown": ("-", "#4477aa", "global batch grows"), "fixed": ("--", "#cc3311", "global batch fixed")}


def require_matplotlib() -> Any:
    """matplotlib, or one line that says how to get it."""
    return require("matplotlib", extra="report", why="the picture of estimate")


def draw(record: Record) -> bytes:
    """A PNG with a diagram for each stage."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in record.rows if row["kind"] == "curve"]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(6.5 * len(stages), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed, nor pyplot's global state
    figure.suptitle(f"Predicted, {record.setting['gpu']}", x=0.01, ha="left", fontsize="medium")
    for stage, axes in zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True):
        mine = [row for row in rows if row["stage"] == stage]
        for scaling, (style, colour, label) in LINES.items():
            line = [row for row in mine if row["scaling"] == scaling]
            places = [row["num_gpus"] for row in line]
            rates = [row["samples_per_second"] for row in line]
            axes.plot(places, rates, style, color=colour, marker=".", label=label)
            if scaling == "grown" and line:
                first = rates[0] / places[0]
                axes.plot(places, [first * place for place in places], ":", color="#888888", label="ideal")
        ticks = sorted({row["num_gpus"] for row in mine})
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="samples a second", title=f"the {stage}")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color="#dddddd")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
