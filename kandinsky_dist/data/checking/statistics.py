"""Figures of very many samples in little memory, gathered by several processes and put together.

Letters of shapes: N samples, K bins, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kandinsky_dist.runtime.hashing import mix

EXACT = 128
"""Numbers below have a bin each."""
BINS_PER_OCTAVE = 64
"""Above, numbers that differ by less than 1.6% share one."""
NUM_OCTAVES = 40

_SHIFT = EXACT.bit_length() - 1 - (BINS_PER_OCTAVE.bit_length() - 1)
_STARTS = np.concatenate(
    [np.arange(EXACT)]
    + [
        np.arange(BINS_PER_OCTAVE, 2 * BINS_PER_OCTAVE, dtype=np.int64) << (_SHIFT + octave)
        for octave in range(NUM_OCTAVES)
    ]
).astype(np.int64)
"""First number of each bin, ascending."""


class Histogram:
    """How non-negative whole numbers are spread: count, sum, least and most exactly, shares within 1.6%."""

    def __init__(self) -> None:
        self.counts_K = np.zeros(len(_STARTS), np.int64)
        self.count = 0
        self.total = 0
        self.least = 0
        self.most = 0

    def add(self, values_N: npt.ArrayLike) -> None:
        """Counts some more numbers."""
        values = np.asarray(values_N, np.int64)
        if not values.size:
            return
        other = Histogram()
        bins = np.searchsorted(_STARTS, values, "right") - 1
        other.counts_K = np.bincount(bins, minlength=len(_STARTS))
        other.count, other.total = values.size, int(values.sum())
        other.least, other.most = int(values.min()), int(values.max())
        self.merge(other)

    def merge(self, other: "Histogram") -> None:
        """Adds what another one has counted."""
        if other.count == 0:
            return
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.counts_K = self.counts_K + other.counts_K
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float:
        """Arithmetic mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The number below or at which about this share of all lies; 0 of nothing."""
        if self.count == 0:
            return 0
        bin_ = int(np.searchsorted(np.cumsum(self.counts_K), share * self.count))
        start, end = int(_STARTS[bin_]), int(np.append(_STARTS, 2 * _STARTS[-1])[bin_ + 1])
        return min(max((start + end - 1) // 2, self.least), self.most)

    def num_above(self, limit: int) -> int:
        """Numbers greater than a limit; exact below 128, else as if a bin's were spread evenly over it."""
        return round(self.count - float(self._below(np.array([limit + 1.0]))[0]))

    def between(self, edges_E: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Numbers between each two edges, the first included; those of a bin are spread evenly over it."""
        return np.diff(self._below(edges_E))

    def _below(self, edges_E: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        used = np.flatnonzero(self.counts_K)
        if not used.size:
            return np.zeros(len(edges_E))
        ends = np.append(_STARTS[1:], 2 * _STARTS[-1])
        # Where the outermost numbers lie in their bins is known.
        lefts, rights = np.maximum(_STARTS[used], self.least), np.minimum(ends[used], self.most + 1)
        sums = np.cumsum(self.counts_K[used])
        xs = np.stack([lefts, rights], 1).ravel()
        ys = np.stack([sums - self.counts_K[used], sums], 1).ravel()
        return np.interp(edges_E, xs, ys)


@dataclass(frozen=True)
class Repeats:
    """How many of some things are there more than once.

    Attributes:
        num_compared: those that were compared.
        num_repeated: of them, those beyond the first of their kind.
        most_alike: size of the largest group of equals.
    """

    num_compared: int
    num_repeated: int
    most_alike: int

    @property
    def share(self) -> float:
        """Repeated ones among the compared."""
        return self.num_repeated / self.num_compared if self.num_compared else 0.0


def prints_of(
    checksums_N: npt.NDArray[np.int64], sizes_N: npt.NDArray[np.int64], one_in: int
) -> npt.NDArray[np.uint64]:
    """What members are compared by: CRC-32 and size. Kept is one kind of content in `one_in`, all its copies.

    So the share of repeated ones stays right however few are kept.
    """
    known = checksums_N >= 0
    prints = (checksums_N[known].astype(np.uint64) << np.uint64(32)) ^ sizes_N[known].astype(np.uint64)
    return prints if one_in == 1 else prints[mix(prints) % np.uint64(one_in) == 0]


def repeats(prints: Sequence[npt.NDArray[np.uint64]]) -> Repeats:
    """Counts equals."""
    joined = np.concatenate([np.empty(0, np.uint64), *prints])
    joined.sort()
    starts = np.flatnonzero(np.append(True, joined[1:] != joined[:-1])) if len(joined) else joined
    largest = int(np.diff(np.append(starts, len(joined))).max()) if len(joined) else 0
    return Repeats(len(joined), len(joined) - len(starts), largest)
