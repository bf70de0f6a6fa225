"""Life and death of the loader's worker processes."""

import atexit
import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from kandinsky_dist.errors import DataError

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
def worker_processes(iterator: Any) -> Iterator[Iterator[Any]]:
    """Ends the workers of a torch iterator at the end of the block or of the program."""
    _alive.add(iterator)
    try:
        yield iterator
    finally:
        _stop(iterator)


@contextmanager
def raising_worker_deaths() -> Iterator[None]:
    """Inside this block, a worker's death raises at once; outside, when a loader is next asked for data.

    torch raises it from a handler of SIGCHLD, that is, wherever the main thread happens to be: in the middle
    of a collective or of a checkpoint.
    """
    global _num_waiting
    _hold_back_torch()
    _num_waiting += 1
    try:
        yield
    finally:
        _num_waiting -= 1


def worker_death(error: RuntimeError) -> Exception:
    """torch's report of a dead worker as one line; any other error as it is."""
    if "DataLoader worker" not in str(error):
        return error
    first = str(error).splitlines()[0].rstrip(". ")
    return DataError(f"{first}; if memory or /dev/shm ran out, lower data.num_workers or data.micro_batch_size")
