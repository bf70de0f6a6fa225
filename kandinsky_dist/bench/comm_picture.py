"""The picture of `bench comm`: bandwidth by size, and steps with and without communication."""

import io
from typing import Any

from kandinsky_dist.bench.collectives import COLLECTIVES, DTYPES, bus_factor
from kandinsky_dist.bench.comm_report import algorithm_bandwidth, milliseconds, size_text, step_rows
from kandinsky_dist.bench.record import Record
from kandinsky_dist.optional import require

COLOURS = ("#4477aa", "#cc3311", "#228833")
LINES = {"fp32": "-", "bf16": "--"}
GRID_COLOUR = "#dddddd"
COMMUNICATION_COLOURS = {"overlapped": "#4477aa", "not overlapped": "#cc3311", "none": "#bbbbbb"}


def require_matplotlib() -> Any:
    """matplotlib, or one line that says how to get it."""
    return require("matplotlib", extra="report", why="the picture of bench comm")


def draw(record: Record) -> bytes:
    """A PNG with bus bandwidth over message size, and the time of steps."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = step_rows(record)
    figure = Figure(figsize=(12 if steps else 6.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed, nor pyplot's global state
    title = f"{record.setting['world_size']} ranks over {record.setting['backend']}, {record.device}"
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    axes = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    _bandwidths(axes[0], record)
    if steps:
        _times(axes[1], steps)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _bandwidths(axes: Any, record: Record) -> None:
    rows = [row for row in record.rows if row["kind"] == "collective"]
    for collective, colour in zip(COLLECTIVES, COLOURS, strict=True):
        factor = bus_factor(collective, record.setting["world_size"])
        for dtype in DTYPES:
            mine = [row for row in rows if (row["collective"], row["dtype"]) == (collective, dtype)]
            axes.plot(
                [row["num_bytes"] for row in mine],
                [algorithm_bandwidth(row) * factor for row in mine],
                LINES[dtype],
                color=colour,
                marker=".",
                label=f"{collective}, {dtype}",
            )
    sizes = sorted({row["num_bytes"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="message", ylabel="bus bandwidth (GB/s)")
    axes.set_xticks(sizes, [size_text(size) for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.grid(color=GRID_COLOUR)
    axes.legend(fontsize="small")


def _times(axes: Any, rows: list[dict[str, Any]]) -> None:
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    cases = list(dict.fromkeys((row["communication"], row["bucket_mib"]) for row in rows))
    width = 0.8 / len(cases)
    for index, (communication, size) in enumerate(cases):
        mine = [row for row in rows if (row["communication"], row["bucket_mib"]) == (communication, size)]
        places = [strategies.index(row["strategy"]) + (index + 0.5) * width - 0.4 for row in mine]
        others = [other for name, other in cases if name == communication]
        axes.bar(
            places,
            [milliseconds(row) for row in mine],
            width * 0.9,
            color=COMMUNICATION_COLOURS[communication],
            alpha=1 - 0.6 * others.index(size) / len(others),
            label=communication if size is None else f"{communication}, buckets of {size:g} MiB",
        )
    axes.set_xticks(range(len(strategies)), strategies)
    highest = max(map(milliseconds, rows))
    axes.set(ylabel="a step (ms)", ylim=(0, 1.6 * highest))  # room for the legend
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.legend(title="communication", fontsize="small", loc="upper left")
