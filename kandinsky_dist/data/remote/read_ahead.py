"""Threads that fetch what will be read soon, and hold no more of it than they may."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, RLock, Thread

from kandinsky_dist.errors import DataError

NUM_THREADS = 32
"""Connections at a time: at 50 ms a request, 32 of 1 MiB fill a line of 600 MB/s."""


class Run:
    """Neighbouring bytes that are fetched by one request, for one or several readers.

    Args:
        start: first byte.
        end: byte behind the last.
        num_readers: readings after which they are let go.
        fetch: gets them.
    """

    def __init__(self, start: int, end: int, num_readers: int, fetch: Callable[[], bytes]) -> None:
        self.start = start
        self.end = end
        self.num_readers = num_readers
        self.fetch = fetch
        self.is_begun = False
        self.held_bytes = 0
        self.is_done = False
        self.data: bytes | None = None
        self.error: BaseException | None = None


class ReadAhead:
    """Fetches runs in the order in which they were added, while there is room for them.

    Daemon threads, begun when first needed: a process may end at any time. Not for use after a fork.

    Args:
        max_bytes: begun and not yet let go. A run that is waited for is begun in any case, one for each
            reader: it may be the one who makes room for others.
        num_threads: that fetch.
    """

    def __init__(self, max_bytes: int, num_threads: int = NUM_THREADS) -> None:
        self._max_bytes = max_bytes
        self._num_threads = num_threads
        self._waiting: deque[Run] = deque()
        self._threads: list[Thread] = []
        self._held_bytes = 0
        self._is_closed = False
        # Reentrant: the garbage collector may call `close` in a thread that is in here.
        lock = RLock()
        self._room = Condition(lock)
        self._finished = Condition(lock)

    def add(self, runs: Sequence[Run]) -> None:
        """Says what to fetch next."""
        with self._room:
            self._waiting.extend(runs)
            while len(self._threads) < min(self._num_threads, len(self._waiting)) and not self._is_closed:
                self._threads.append(Thread(target=self._work, name="read ahead", daemon=True))
                self._threads[-1].start()
            self._wake()

    def result(self, run: Run) -> bytes:
        """The bytes of a run, waited for; fetched here if its turn has not come.

        Raises:
            DataError: it could not be fetched.
        """
        with self._room:
            is_mine = not run.is_begun
            if is_mine:
                self._begin(run)
        if is_mine:
            self._fetch(run)
        with self._finished:
            while not run.is_done:
                self._finished.wait()
        if isinstance(run.error, DataError):
            raise type(run.error)(*run.error.args) from run.error  # several readers may raise it
        if run.error is not None:
            raise run.error
        assert run.data is not None
        return run.data

    def release(self, run: Run) -> None:
        """Says that one reader needs a run no longer."""
        with self._room:
            run.num_readers -= 1
            if run.num_readers == 0:
                if run.is_done:
                    self._let_go(run)
                run.is_begun = True  # if it was not: nobody wants it any more

    def close(self) -> None:
        """Ends the threads when they are done with what they do."""
        with self._room:
            self._is_closed = True
            self._waiting.clear()
            self._room.notify_all()

    def _work(self) -> None:
        while True:
            with self._room:
                while (run := self._next()) is None:
                    if self._is_closed:
                        return
                    self._room.wait()
                self._begin(run)
                self._wake()
            self._fetch(run)
            del run  # not kept while waiting for the next one

    def _wake(self) -> None:
        """Wakes one thread if there is work; it wakes the next. All at once would be in the readers' way."""
        if self._has_next():
            self._room.notify()

    def _next(self) -> Run | None:
        return self._waiting.popleft() if self._has_next() else None

    def _has_next(self) -> bool:
        while self._waiting and self._waiting[0].is_begun:
            self._waiting.popleft()  # by a reader
        if not self._waiting:
            return False
        num_bytes = self._waiting[0].end - self._waiting[0].start
        return not self._held_bytes or self._held_bytes + num_bytes <= self._max_bytes

    def _begin(self, run: Run) -> None:
        run.is_begun = True
        run.held_bytes = run.end - run.start
        self._held_bytes += run.held_bytes

    def _fetch(self, run: Run) -> None:
        try:
            run.data = run.fetch()
        except BaseException as error:
            run.error = error
        with self._finished:
            run.is_done = True
            if run.error is not None or run.num_readers <= 0:
                self._let_go(run)
            self._finished.notify_all()

    def _let_go(self, run: Run) -> None:
        self._held_bytes -= run.held_bytes
        run.held_bytes = 0
        run.data = None
        self._wake()
