"""What the ranks of the watch's tests run."""

import ctypes
import resource
import time
from pathlib import Path
from typing import Any

from kandinsky_dist.cli import main
from kandinsky_dist.config import loader
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train import trainer as module
from kandinsky_dist.train.trainer import Trainer


class Slow:
    """An objective that takes so many times as long over its frozen encoders."""

    def __init__(self, objective: Any, times: float) -> None:
        self._objective = objective
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def prepare(self, batch: Any) -> Any:
        start = time.monotonic()
        found = self._objective.prepare(batch)
        time.sleep(0.2 + (self._times - 1) * (time.monotonic() - start))
        return found


def one_slow_rank(settings: dict[str, Any], slow_rank: int, times: float) -> None:
    """Trains, one rank so many times as slowly."""
    with joined() as process:
        resolved = loader.load("prior", None, [loader.Layer("test", settings)])
        trainer = Trainer(resolved, process, StopRequest())
        if process.rank == slow_rank:
            trainer.objective = Slow(trainer.objective, times)  # type: ignore[assignment]
        trainer.run()


def with_little_memory(arguments: list[str], room_bytes: int) -> int:
    """The command line in a process whose memory ends a little above what training needs to begin."""
    begin = module.Trainer.run

    def run(self: Any) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes, resource.RLIM_INFINITY))
        begin(self)

    module.Trainer.run = run  # type: ignore[method-assign]
    return main(arguments)


def taken_over_in_its_report(arguments: list[str]) -> int:
    """The command line; while the run measures itself on held-out samples another start takes its folder."""
    evaluate = module.Trainer.evaluate

    def while_taken(self: Any) -> dict[str, float]:
        found = evaluate(self)
        if self.process.is_first:
            Fence(self.run_dir).take(1)
        return found

    module.Trainer.evaluate = while_taken  # type: ignore[method-assign]
    return main(arguments)


def one_keeps_the_lock(arguments: list[str], rank: int, hung: Path) -> int:
    """The command line; from the third step on an extension of one rank keeps the interpreter's lock."""
    write_audit = module.Trainer.write_audit

    def then_hang(self: Any, microbatches: Any) -> None:
        write_audit(self, microbatches)
        if self.state.step == 3 and self.process.rank == rank:
            hung.touch()
            ctypes.PyDLL(None).sleep(10_000)  # PyDLL, unlike CDLL, does not let go of the lock

    module.Trainer.write_audit = then_hang  # type: ignore[method-assign]
    return main(arguments)
