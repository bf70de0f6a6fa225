"""One piece of work at a time beside the main thread."""

import threading
from collections.abc import Callable


class Background:
    """Runs work on a thread of its own, and keeps what went wrong until it is asked for.

    The thread never keeps the process from ending: who needs the work done waits for it.

    Args:
        on_failure: called on the thread as soon as the work has failed.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Starts work; the last one must have been waited for."""
        assert self._thread is None, "one at a time"
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Exception | None:
        """Waits for the work under way; returns what it failed with, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
            self._on_failure()
