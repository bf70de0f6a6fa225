"""Which rank is slower than the others by itself, and not because it waits for them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from kandinsky_dist.faults.divergence import MAD_TO_DEVIATION

MIN_DEVIATIONS = 6.0
"""Ranks differ a little anyway; an outlier is this many deviations from the middle."""
PATIENCE = 2
"""Log entries in a row that a rank must stand out in: a page fault or a slow file is forgiven."""


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for.

    Attributes:
        rank: of the process.
        excess: how much longer than the ranks' middle it takes alone, as a share of a step.
        is_news: whether the last judgement did not name it.
    """

    rank: int
    excess: float
    is_news: bool


class Stragglers:
    """Finds the rank that stands out.

    Args:
        share: of a step by which a rank must be slower; 0 for never.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: int | None = None  # the rank that stood out last, and how often in a row
        self._times = 0

    def judge(self, alone_seconds: Sequence[float], window_seconds: float) -> Straggler | None:
        """Judges the steps since the last log entry.

        Args:
            alone_seconds: what each rank, by rank, took in them for what it does without the others.
            window_seconds: how long the steps took, waiting included.

        Returns:
            The slowest rank, if it has stood out often enough in a row.
        """
        middle = median_low(alone_seconds)
        deviation = MAD_TO_DEVIATION * median_low(abs(value - middle) for value in alone_seconds)
        slowest = max(alone_seconds)
        rank = alone_seconds.index(slowest)
        excess = (slowest - middle) / window_seconds if window_seconds > 0 else 0.0
        is_outlier = slowest > middle + MIN_DEVIATIONS * deviation and 0 < self._share <= excess
        self._times = (self._times + 1 if rank == self._last else 1) if is_outlier else 0
        self._last = rank if is_outlier else None
        if self._times < PATIENCE:
            return None
        return Straggler(rank, min(1.0, excess), is_news=self._times == PATIENCE)
