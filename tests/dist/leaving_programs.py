"""Ranks that leave their process groups, or hang there."""

import ctypes
import os
import sys
from pathlib import Path

from kandinsky_dist.cli import main
from kandinsky_dist.errors import StoppedError
from kandinsky_dist.runtime import deadline
from kandinsky_dist.runtime.process import joined

GLOO_THREADS = ("gloo_tcp_loop", "pt_gloo_runloop")


def gloo_threads() -> list[str]:
    """Return the names of this process's threads that belong to process groups."""
    from helpers.running import thread_names

    return [name for name in thread_names() if name in GLOO_THREADS]


def train(arguments: list[str]) -> tuple[int, list[str]]:
    """Train by the command line; return its exit code and the threads of groups that it leaves behind."""
    code = main(arguments)
    return code, gloo_threads()


def keep_engine() -> tuple[list[str], list[str]]:
    """Hold a DDP engine past the end of its group; return the threads of groups before and after that end."""
    from torch import nn
    from torch.optim import AdamW

    from kandinsky_dist.config.schema import Config
    from kandinsky_dist.parallel.base import ModelPlan
    from kandinsky_dist.parallel.select import select

    with joined() as process:
        strategy = select(Config(stage="prior"), process, num_micro=1)
        held = strategy.prepare(
            ModelPlan(
                build=lambda: nn.Linear(4, 4),
                state_dict=dict,
                optimizer=lambda named: AdamW([item for _, item in named], fused=True),
            )
        )
        during = gloo_threads()
    after = gloo_threads()
    assert held is not None
    return during, after


class _Stuck:
    """An owner of a group that never returns, and keeps the interpreter's lock."""

    def release(self) -> None:
        ctypes.PyDLL(None).pause()


def hang(folder: Path, is_recorded: bool, is_stopped: bool) -> int:
    """Hang on the last rank while the groups are left."""
    deadline.LEAVE_SECONDS = 1.0
    stuck = _Stuck()
    with joined(is_recorded=is_recorded) as process:
        if process.rank == process.world_size - 1:
            process.before_leaving(stuck.release)
        (folder / str(process.rank)).write_text(str(os.getpid()))
        if is_stopped:
            raise StoppedError("stopped")
    return 7 if process.rank else 0


if __name__ == "__main__":  # under a launcher
    try:
        hang(Path(sys.argv[1]), is_recorded=True, is_stopped=True)
    except StoppedError as stopped:
        sys.exit(stopped.exit_code)
