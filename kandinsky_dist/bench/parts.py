"""Where a step's time goes: clocks around its parts, read on the device where there is one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from kandinsky_dist.telemetry.stopwatch import Stopwatch

PARTS = ("data", "encoders", "forward", "backward", "optimizer", "average")
"""Parts of a step in their order. What is in none of them, such as host reads, is the rest of the step."""


class Parts:
    """Seconds of each part since they were last read. Parts on several streams of a GPU may overlap.

    Args:
        device: where they run; data is waited for by the host.
    """

    def __init__(self, device: torch.device) -> None:
        host = torch.device("cpu")
        self._clocks = {name: Stopwatch(host if name == "data" else device) for name in PARTS}

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Counts what is inside. No host sync."""
        return self._clocks[part].running()

    def time_calls(self, owner: Any, method: str, part: str) -> None:
        """Counts every call of one object's method."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(part):
                return call(*args, **kwargs)

        replace_method(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; 0 where it did not happen. Waits for the device."""
        return {name: clock.read() for name, clock in self._clocks.items()}


def replace_method(owner: Any, method: str, by: Callable[..., Any]) -> None:
    """Makes one object, which may be frozen, answer with another function; its class stays as it is."""
    object.__setattr__(owner, method, by)
