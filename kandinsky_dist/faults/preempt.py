"""Stop requests: a signal is remembered, and acted on between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop. Ranks agree on it by `train.feed.Feed`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_asked_inside = False

    @property
    def is_made(self) -> bool:
        """Whether a stop signal has come, or this process has asked itself to stop."""
        return self._signal is not None or self._is_asked_inside

    def make(self) -> None:
        """Asks for a stop from inside, as a signal does from outside; from any thread."""
        self._is_asked_inside = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catches the stop signals for the length of the context.

        To be entered before the slow imports: a signal that comes while the run starts must not kill it.
        """
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # Once a stop is made the process is on its way out: the launcher, which signals all others
                # when the first rank has ended, must not kill the one that takes longer over it. Ignored, for
                # the interpreter drops handlers as it ends. A keyboard still interrupts.
                is_kept = self.is_made and number != signal.SIGINT
                signal.signal(number, signal.SIG_IGN if is_kept else handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at a keyboard: now
        self._signal = number
