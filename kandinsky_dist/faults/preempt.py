"""Stop requests: a signal to any one rank is heard by all, at the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kandinsky_dist.runtime.agree import LaggedFlag

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that this process was asked to stop; ranks agree on it once a step."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._flag = LaggedFlag()

    def is_agreed(self) -> bool:
        """Whether any rank had been asked to stop by its previous step. Collective: every step."""
        return self._flag.poll(self._signal is not None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the stop signals for the length of the context."""
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at a keyboard: now
        self._signal = signal.Signals(number)
