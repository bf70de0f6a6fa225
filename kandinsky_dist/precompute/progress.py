"""How far all processes together are, for whoever watches one of them."""

import sys
from collections.abc import Callable
from time import monotonic

from kandinsky_dist.precompute.shard import Spent
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.words import duration, rate

LINE_EVERY_SECONDS = 15.0


class Progress:
    """A line now and then: shards done by all, this process's rate, everybody's, and the time that is left.

    Args:
        num_samples: of all shards.
        num_done: counts the samples of the shards that are done, by whomever.
        is_shown: on one process of a machine or job.
    """

    def __init__(self, num_samples: int, num_done: Callable[[], int], *, is_shown: bool) -> None:
        self._num_samples = num_samples
        self._num_done = num_done
        self._is_shown = is_shown
        self._start = self._last = monotonic()
        self._done_before = num_done() if is_shown else 0

    def update(self, spent: Spent) -> None:
        """Says how far it is, if it has not been said for a while."""
        now = monotonic()
        if not self._is_shown or now - self._last < LINE_EVERY_SECONDS:
            return
        self._last = now
        done = self._num_done()
        all_rate = (done - self._done_before) / (now - self._start)
        left = "?"
        if all_rate > 0:
            left = duration((self._num_samples - done) / all_rate)
        say(
            f"precompute: {done:,} of {self._num_samples:,} samples ({done / self._num_samples:.1%}), "
            f"{rate(all_rate)}, here {rate(_rate(spent))}, ETA {left}"
        )


def summary(spent: Spent) -> str:
    """What this process did, and what it waited for."""
    if not spent.num_samples:
        return "nothing left to do here"
    waited = spent.waiting_seconds / max(spent.seconds, sys.float_info.epsilon)
    return (
        f"{spent.num_samples:,} samples here at {rate(_rate(spent))}, {waited:.0%} of the time "
        "waiting for decoded images"
    )


def _rate(spent: Spent) -> float:
    return spent.num_samples / max(spent.seconds, sys.float_info.epsilon)
