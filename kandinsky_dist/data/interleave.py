"""Several endless sequences as one, each at its own rate: a pure function of the place in it.

Time is cut into periods. In period e, sequence s has floor((e + 1) r_s) - floor(e r_s) turns, where r_s is
its rate as an exact fraction, so that no share drifts however long the run; a period's turns are shuffled.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from kandinsky_dist.runtime.hashing import Stream, hash_counters

Int64s = npt.NDArray[np.int64]

MAX_PERIOD = 2**20
"""Turns of a period at most: what one keeps in memory is 12 bytes a turn."""
MIN_PERIOD = 8
"""Turns of a period at least: a shorter one would be looked up for every turn."""
NUM_CACHED_PERIODS = 2


class Interleave:
    """Turn -> whose it is, and which of that sequence's turns.

    Args:
        rates: turns of each sequence a period, above 0; scaled together to bound periods.
        seed: of the shuffle.
    """

    def __init__(self, rates: Sequence[Fraction], *, seed: int) -> None:
        assert rates
        assert min(rates) > 0
        total = sum(rates, Fraction(0))
        scale = -(-total // MAX_PERIOD) if total > MAX_PERIOD else min(Fraction(1), total / MIN_PERIOD)
        self._rates = [rate / scale for rate in rates]
        self._sum = sum(self._rates, Fraction(0))
        self._seed = seed
        self._forget()

    def locate(self, turns: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], Int64s]:
        """Whose some turns are.

        Args:
            turns: int64, non-negative, of any order.

        Returns:
            sequence (int32), and which of its turns each is, from 0 (int64).
        """
        flat = np.asarray(turns, np.int64)
        owners, numbers = np.empty(flat.shape, np.int32), np.empty(flat.shape, np.int64)
        done = np.zeros(flat.shape, bool)
        while not done.all():
            period = self._period_of(int(flat[~done][0]))
            start, end = self._turns_before(period), self._turns_before(period + 1)
            inside = (flat >= start) & (flat < end)
            period_owners, period_numbers = self._period(period)
            owners[inside] = period_owners[flat[inside] - start]
            numbers[inside] = period_numbers[flat[inside] - start]
            done |= inside
        return owners, numbers

    def _period_of(self, turn: int) -> int:
        period = int(
            turn / self._sum
        )  # exact: a Fraction; never too late, as rounding down only delays turns
        while self._turns_before(period + 1) <= turn:
            period += 1
        return period

    def _turns_before(self, period: int) -> int:
        return sum(int(period * rate) for rate in self._rates)

    def _period(self, period: int) -> tuple[npt.NDArray[np.int32], Int64s]:
        found = self._periods.get(period)  # another thread may drop it at any time
        if found is None:
            firsts = [int(period * rate) for rate in self._rates]
            counts = [
                int((period + 1) * rate) - first for rate, first in zip(self._rates, firsts, strict=True)
            ]
            start = self._turns_before(period)
            counters = np.arange(start, start + sum(counts), dtype=np.uint64)
            shuffle = np.argsort(hash_counters(self._seed, Stream.TURN_ORDER, counters))
            owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[shuffle]
            numbers = np.empty(len(owners), np.int64)
            for owner, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                numbers[owners == owner] = np.arange(first, first + count)
            found = self._periods[period] = owners, numbers
            if len(self._periods) > NUM_CACHED_PERIODS:
                with suppress(KeyError):
                    self._periods.popitem(last=False)
        return found

    def _forget(self) -> None:
        self._periods: OrderedDict[int, tuple[npt.NDArray[np.int32], Int64s]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # What is cached is a function of the rest: a worker process works it out for itself.
        return {name: value for name, value in self.__dict__.items() if name != "_periods"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
