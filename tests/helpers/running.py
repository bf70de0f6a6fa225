"""Runs in the background that tests kill, stop and disturb."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from helpers.forked import Ranks


@contextmanager
def started(arguments: Sequence[str], world_size: int) -> Iterator[subprocess.Popen[str]]:
    """`kandinsky-dist ARGUMENTS`, under torchrun if on several ranks; what is left of it is killed."""
    program = ["-m", "kandinsky_dist", *arguments]
    if world_size > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *program],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher, every rank and every worker at once."""
    end_all(process)
    if process.stderr:
        process.stderr.close()


def end_all(process: subprocess.Popen[str]) -> None:
    """`kill_all`, after which what was said can still be read."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            if member.is_running():
                member.send_signal(signal.SIGKILL)
    process.wait()


def said(run: subprocess.Popen[str] | Ranks) -> str:
    """All that a run that has ended wrote to stderr."""
    if isinstance(run, Ranks):
        return run.said()
    assert run.stderr
    return run.stderr.read()


def wait_until(is_so: Callable[[], Any], run: subprocess.Popen[str] | Ranks, *, timeout: float = 180) -> Any:
    """Waits for a fact; fails if the run ends first without it."""
    deadline = time.monotonic() + timeout
    while not (fact := is_so()):
        assert run.poll() is None, f"the run ended first: {said(run)[-3000:]}"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return fact


def ranks_of(process: subprocess.Popen[str] | Ranks) -> dict[int, psutil.Process]:
    """Rank -> its process, once all of them have begun."""
    if isinstance(process, Ranks):
        return process.by_rank()
    found = {}
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            environ = member.environ()
            if "RANK" in environ and member.parent().environ().get("RANK") is None:
                found[int(environ["RANK"])] = member
        except psutil.Error:
            continue
    return found


def workers_of(process: subprocess.Popen[str] | Ranks) -> list[psutil.Process]:
    """The ranks' data workers."""
    return [child for rank in ranks_of(process).values() for child in rank.children()]


def thread_names() -> list[str]:
    """The names of this process's threads, as the system knows them."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append((task / "comm").read_text().strip())
    return names
