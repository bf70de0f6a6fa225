"""How long this rank's device works in some sections of a step, without waiting for it there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up sections: on a GPU the time between two events on the stream, on a CPU that of the host.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is inside. No host sync."""
        if not self._is_cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def read(self) -> float:
        """Seconds since the last reading. Waits for the last section on the device."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
            seconds += sum(first.elapsed_time(last) for first, last in events) / 1000
        return seconds
