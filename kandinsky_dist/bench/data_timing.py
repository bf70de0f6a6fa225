"""How fast a contender is, in a process that has never done anything else."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kandinsky_dist.bench.data_contenders import Batches
from kandinsky_dist.bench.data_samples import CLIP_SIZE, EMBEDDING_D, LATENTS_CHW, RESOLUTION

WARM_UP_SECONDS = 0.5
WARM_UP_BATCHES = 8
SHAPES = {
    "cached": (LATENTS_CHW, (EMBEDDING_D,)),
    "jpeg": ((3, CLIP_SIZE, CLIP_SIZE), (3, RESOLUTION, RESOLUTION)),
}


@dataclass(frozen=True)
class Timing:
    """One repeat.

    Attributes:
        busy_cores: processor seconds a second, of the process and its workers.
    """

    samples_per_second: float
    busy_cores: float


def measure(
    form: str,
    batches: Callable[[Any, int, int], Batches],
    folder: str | Path,
    batch_size: int,
    num_workers: int,
    seconds: float,
) -> Timing:
    """Counts samples for some seconds, after a warm-up. For `in_new_process`.

    A consumer that does nothing is always faster than its loader: what was made in advance is used up when
    counting begins.
    """
    torch.set_num_threads(1)
    _read_whole(folder)
    iterator = batches(folder, batch_size, num_workers)
    found = tuple(tuple(part.shape) for part in next(iterator))
    expected = tuple((batch_size, *shape) for shape in SHAPES[form])
    if found != expected:
        raise ValueError(f"batches of shapes {found}, not {expected}")
    begin, num_batches = time.perf_counter(), 0
    while num_batches < WARM_UP_BATCHES or time.perf_counter() - begin < WARM_UP_SECONDS:
        next(iterator)
        num_batches += 1
    begin, busy_seconds, num_batches, elapsed = time.perf_counter(), _busy_seconds(), 0, 0.0
    while elapsed < seconds:
        next(iterator)
        num_batches += 1
        elapsed = time.perf_counter() - begin
    return Timing(num_batches * batch_size / elapsed, (_busy_seconds() - busy_seconds) / elapsed)


def _read_whole(folder: str | Path) -> None:
    """Brings a local folder's files into the page cache, from which others may have driven them."""
    piece = bytearray(2**20)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass


def _busy_seconds() -> float:
    """Processor time of this process and its children that are alive."""
    times = [_ticks(os.getpid()), *map(_ticks, _descendants(os.getpid()))]
    return sum(times) / os.sysconf("SC_CLK_TCK")


def _ticks(process: int) -> int:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # gone, or no Linux
    return int(fields[11]) + int(fields[12])


def _descendants(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def in_new_process(function: Callable[..., Any], *arguments: Any, timeout_seconds: float) -> Any:
    """Calls a function of a module's top level in a new, spawned process.

    Returns:
        what it returned, or the text of what went wrong as a RuntimeError, not raised: one contender that
        fails is a row, not the end.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_call, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(timeout_seconds):
            return RuntimeError(f"no result after {timeout_seconds:.0f} s")
        return here.recv()
    except EOFError:
        process.join()
        return RuntimeError(f"the process ended with exit code {process.exitcode}")
    finally:
        process.join(5)
        if process.is_alive():
            for child in _descendants(process.pid or 0):
                _end(child)
            process.kill()
            process.join()


def _call(results: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # A spawned process would spawn its workers too; loaders are to start them as in a script.
    multiprocessing.set_start_method(None, force=True)
    os.dup2(2, 1)  # bars and greetings of libraries are no part of the table on standard output
    try:
        result = function(*arguments)
    except Exception as error:
        text = " ".join(str(error).split())
        result = RuntimeError(f"{type(error).__name__}: {text[:300]}")
    results.send(result)
    results.close()
    os._exit(0)  # some libraries' threads and servers would be waited for


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
