"""Where a step's time goes: clocks around its parts, read on the device where there is one."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "encoders", "forward", "backward", "optimizer", "average")
"""Parts of a step in their order. What is in none of them, such as host reads, is the rest of the step."""


class Stopwatch:
    """Seconds of each part since `clear`.

    On CUDA a part is what lies between two events on the stream that was current, so that measuring makes
    nobody wait; parts on several streams may overlap, and their sum may exceed the step.

    Args:
        device: where the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Starts from nothing."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside to a part. No host sync."""
        if not self._is_cuda or name == "data":  # data is waited for by the host
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def add(self, name: str, seconds: float) -> None:
        """Counts what somebody else has timed."""
        self._seconds[name] += seconds

    def around(self, owner: Any, method: str, name: str) -> None:
        """Counts every call of an object's method to a part."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        replace_method(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds of each part; 0 where it did not happen. The device must have finished."""
        found = dict.fromkeys(PARTS, 0.0) | self._seconds
        for name, first, last in self._events:
            found[name] += first.elapsed_time(last) / 1e3
        return found


def replace_method(owner: Any, method: str, by: Callable[..., Any]) -> None:
    """Makes one object, which may be frozen, answer with another function; its class stays as it is."""
    object.__setattr__(owner, method, by)
