"""Aspect buckets: which images share a batch when they are not all cut square."""

import numpy as np
import numpy.typing as npt

ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2 / 1)
"""Width over height of each bucket. Manifests count samples by these: append, never reorder."""
NUM_ASPECTS = len(ASPECTS)
SQUARE = ASPECTS.index(1.0)
WHOLE = -1
"""In place of a bucket's number: all samples, whatever their shape."""


def nearest_aspects(widths: npt.NDArray, heights: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Bucket of each image by its size in pixels, uint8; the square one where a size is unknown (0)."""
    known = (widths > 0) & (heights > 0)
    ratios = np.log(np.where(known, widths, 1) / np.where(known, heights, 1))
    return np.abs(ratios[:, None] - np.log(ASPECTS)).argmin(1).astype(np.uint8)


def view_size(aspect: int, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels of a bucket's images.

    The area is about that of a square of `resolution`, both sides are multiples of `multiple`.
    """
    if aspect in (WHOLE, SQUARE):
        return resolution, resolution
    height, width = resolution * ASPECTS[aspect] ** -0.5, resolution * ASPECTS[aspect] ** 0.5
    return _rounded(height, multiple), _rounded(width, multiple)


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
