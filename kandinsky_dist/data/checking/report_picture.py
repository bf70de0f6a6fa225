"""A corpus report's picture: how sizes, shapes and captions are spread."""

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.aspects import ASPECTS
from kandinsky_dist.data.checking.report_text import aspect_name
from kandinsky_dist.data.checking.statistics import Histogram
from kandinsky_dist.data.checking.survey import Findings
from kandinsky_dist.optional import require

MAX_TOKENS = 77
NUM_BINS = 40
LOGARITHMIC_FROM = 15
"""Most over median, from which an axis is logarithmic."""
MIN_RANGE = 10
"""An axis shows at least so many whole numbers: one value is a bar, not a plane."""
COLOUR, LINE_COLOUR, GRID_COLOUR = "#4477aa", "#cc3311", "#dddddd"


def require_matplotlib() -> Any:
    """matplotlib, or one line that says how to get it."""
    return require("matplotlib", extra="report", why="the picture of data check --out")


def draw(title: str, findings: Findings, tokens: Histogram | None, resolution: int) -> bytes:
    """A PNG with six histograms.

    Args:
        title: over all of them.
        findings: of the corpus.
        tokens: of captions; in their absence captions' bytes are shown.
        resolution: side of the decoder's view, pixels, which is marked.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed, nor pyplot's global state
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    axes = figure.subplots(2, 3)
    mark = (resolution, f"{resolution} px")
    _spread(axes[0, 0], findings.short_sides, "shorter side of the image (pixels)", "images", mark)
    _spread(axes[0, 1], findings.long_sides, "longer side of the image (pixels)", "images")
    _aspects(axes[0, 2], findings.aspect_counts_A)
    _spread(axes[1, 0], findings.image_bytes, "image file (KiB)", "images", unit=1024)
    _spread(axes[1, 1], findings.caption_characters, "caption (characters)", "captions read")
    if tokens is None:
        _spread(axes[1, 2], findings.caption_bytes, "caption (bytes)", "captions")
    else:
        mark = (MAX_TOKENS, "CLIP reads 77")
        _spread(axes[1, 2], tokens, "caption (tokens, with start and end)", "captions read", mark)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def edges_of(histogram: Histogram) -> tuple[npt.NDArray[np.float64], bool]:
    """Whole numbers that part a histogram into about NUM_BINS bins, and whether these widen to the right."""
    least, most = histogram.least, histogram.most
    if most > LOGARITHMIC_FROM * max(1, histogram.quantile(0.5)):
        edges = np.unique(np.round(np.geomspace(max(1, least), most + 1, NUM_BINS + 1)))
        return (np.concatenate([[0.0], edges]) if least == 0 else edges), True
    step = max(1, math.ceil((most + 1 - least) / NUM_BINS))
    return np.arange(least, most + 1 + step, step, dtype=np.float64), False


def _spread(
    axis: Any,
    histogram: Histogram,
    label: str,
    what: str,
    mark: tuple[int, str] | None = None,
    unit: int = 1,
) -> None:
    _plain(axis, label, what)
    if histogram.count == 0:
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", va="center", color="grey")
        axis.set(xticks=[], yticks=[])
        return
    edges_E, is_logarithmic = edges_of(histogram)
    axis.stairs(histogram.between(edges_E), edges_E / unit, fill=True, color=COLOUR)
    if is_logarithmic:
        axis.set_xscale("symlog" if histogram.least == 0 else "log")
    missing = MIN_RANGE * unit - (edges_E[-1] - edges_E[0])
    if missing > 0:
        axis.set_xlim((edges_E[0] - missing / 2) / unit, (edges_E[-1] + missing / 2) / unit)
        axis.locator_params(axis="x", integer=True)
    axis.xaxis.set_major_formatter(_short)
    if mark is not None and edges_E[0] <= mark[0] <= edges_E[-1]:
        axis.axvline(mark[0], color=LINE_COLOUR, linewidth=1)
        is_right = axis.transLimits.transform((mark[0], 0))[0] > 0.6
        axis.annotate(
            mark[1],
            (mark[0], 1),
            (-3 if is_right else 3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="top",
            color=LINE_COLOUR,
        )


def _aspects(axis: Any, counts_A: npt.NDArray[np.int64]) -> None:
    _plain(axis, "aspect bucket (width:height)", "images")
    axis.bar([aspect_name(aspect) for aspect in ASPECTS], counts_A, color=COLOUR)


def _plain(axis: Any, label: str, what: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel(what)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID_COLOUR, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_formatter(_short)


def _short(value: float, _: object) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:g}{unit}"
    return f"{value:g}"
