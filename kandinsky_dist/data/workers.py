"""Life and death of the loader's worker processes."""

import atexit
import os
import signal
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import torch

from kandinsky_dist.errors import DataError


class WorkerDiedError(DataError):
    """A worker process ended, by the system's hand or its own."""


DEATH_SECONDS = 5.0

_alive: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""torch iterators whose workers have not been stopped."""
_num_waiting = 0
"""Places of the program that wait for a worker just now."""


def start_worker(worker: int) -> None:
    """Prepares a worker process, in it."""
    # SLURM and a terminal signal every process of a job. Whether to stop is for the training process to
    # decide, which still needs the batches of the step that it is in.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


@contextmanager
def worker_processes(loader: Iterable[Any]) -> Iterator[Any]:
    """The iterator of a torch DataLoader, whose workers end with the block or with the program."""
    before = signal.getsignal(signal.SIGCHLD)
    with quiet_about_cores():
        iterator = iter(loader)
    _hold_back(before, signal.getsignal(signal.SIGCHLD))
    _alive.add(iterator)
    try:
        yield iterator
    finally:
        _alive.discard(iterator)
        _stop(iterator)


@contextmanager
def quiet_about_cores() -> Iterator[None]:
    """Keeps torch from warning of more processes than cores: data.num_workers is the user's to choose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def next_from(iterator: Any) -> Any:
    """The next item of an iterator that `worker_processes` gave.

    Raises:
        WorkerDiedError: a worker died; in one line.
    """
    try:
        with _raising_worker_deaths():
            return next(iterator)
    # A death shows as torch's RuntimeError, or as a broken pipe when tensors are fetched from the dead.
    except (RuntimeError, OSError, EOFError) as error:
        workers = list(getattr(iterator, "_workers", ()))
        # A connection breaks, and a sentinel too, a moment before the process that held it counts as dead.
        ended = wait([worker.sentinel for worker in workers], timeout=DEATH_SECONDS)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(DEATH_SECONDS)
        dead = [worker for worker in workers if not worker.is_alive()]
        if not dead:
            raise
        raise WorkerDiedError(
            f"a data worker (process {dead[0].pid}) {_ending(dead[0].exitcode)}; if memory or /dev/shm "
            "ran out, lower data.num_workers or data.micro_batch_size"
        ) from error


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


@contextmanager
def _raising_worker_deaths() -> Iterator[None]:
    global _num_waiting
    _num_waiting += 1
    try:
        yield
    finally:
        _num_waiting -= 1


def _hold_back(before: Any, torchs: Any) -> None:
    """Lets torch raise a worker's death only while somebody waits for data.

    torch does so in a handler of SIGCHLD, that is, wherever the main thread happens to be: in the middle of
    a collective or of a checkpoint. A death that is held back is found when data is next asked for.

    Args:
        before: handler before torch started workers.
        torchs: handler after it did; torch installs its own once a process.
    """
    if torchs is before:
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if _num_waiting:
            torchs(number, frame)
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGCHLD, handler)


def _stop(iterator: Any) -> None:
    """Ends workers now, not when the garbage collector finds their iterator."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is None:
        return  # without worker processes
    try:
        with _raising_worker_deaths():  # else a worker that died holding a lock would be waited for
            shut_down()
    except RuntimeError:
        pass  # dead already
    for worker in iterator._workers:
        if worker.is_alive():  # stuck in a read; SIGTERM, which torch sent, is ignored
            worker.kill()
            worker.join()


@atexit.register
def _stop_all() -> None:
    # multiprocessing joins its children at exit, after a SIGTERM that ours ignore: it would wait for ever.
    for iterator in list(_alive):
        _stop(iterator)
