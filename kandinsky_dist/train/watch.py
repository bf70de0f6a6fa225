"""What the trainer tells of itself while it runs, and what comes of it: hangs, stragglers, a stop in time."""

import os
import time
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import DISK_FULL, ConfigError, DiskFullError, StoppedError
from kandinsky_dist.faults.fence import Fence, Owner
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.faults.straggler import Stragglers
from kandinsky_dist.faults.time_left import TimeLeft, job_end
from kandinsky_dist.faults.watchdog import Watchdog, Watched
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.disk import write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.telemetry.stopwatch import Stopwatch


def open_run_dir(run_dir: Path, config_yaml: str, fence: Fence, world_size: int) -> Owner:
    """Makes the run folder or takes it over, and writes the resolved configuration. Rank 0 only."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        owner = fence.take(world_size)
        write_whole(run_dir / "config.yaml", config_yaml)
        return owner
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(f"run.dir={run_dir}: {error.strerror}; make room and retry") from error
        raise ConfigError(f"run.dir={run_dir} cannot be written: {error.strerror}") from error


class Watch:
    """Watches one start of a run. Collective: made on every rank, once the run folder is this start's.

    Args:
        config: of the run.
        run_dir: its folder.
        fence: of this start, which has the folder.
        owner: what `fence` has taken.
        checkpoints: of the run.
        process: this rank.
        stop: made where the time runs out.
        dog: ends this process if the run hangs, where it is entered.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        fence: Fence,
        owner: Owner,
        checkpoints: CheckpointManager,
        process: Process,
        stop: StopRequest,
        dog: Watchdog,
    ) -> None:
        self._process = process
        self._fence = fence
        self._checkpoints = checkpoints
        self._stop = stop
        self._dog = dog
        self.step = 0
        """Optimizer steps that are done."""
        self._device_steps = _DeviceSteps(process.device)
        self._alone = Stopwatch(process.device)
        self._stragglers = Stragglers(config.watchdog.straggler_share)
        fence.join(owner)
        end = agree.decided_by_first(lambda: _end(config.run.time_limit_seconds))
        self.time_left = TimeLeft(end, config.run.time_margin_seconds, owner.save_seconds)
        watched = Watched(run_dir, fence, process.rank, process.world_size, config.watchdog)
        dog.begin(watched, self._device_steps.done, self._save_seconds)

    def enter(self, phase: str) -> None:
        """Says what this rank does from now on; the same on every rank. No host sync."""
        self._dog.enter(phase, self.step)

    def alone(self) -> AbstractContextManager[None]:
        """Times what this rank does without the others. No host sync."""
        return self._alone.running()

    def stepped(self, step: int) -> None:
        """Takes in that a step is done, and asks for a stop where the time left demands it. No host sync."""
        self.step = step
        self._dog.stepped()
        self._device_steps.queued()
        self.time_left.saw_step()
        self.time_left.saw_save(self._checkpoints.save_seconds)
        if self._process.is_first and not self._stop.is_made and self.time_left.must_stop():
            say(
                f"{self.time_left.seconds():.0f} s are left, and a checkpoint takes up to "
                f"{self.time_left.save_seconds:.0f} s: the run saves itself and stops"
            )
            self._stop.make()

    def check_save(self, saved_step: int) -> None:
        """Returns if a checkpoint may be begun. Collective: call on every rank.

        Raises:
            StoppedError: it would not be written before the run's time is over.
        """
        if self.time_left.end is None:
            return

        def check() -> None:
            if not self.time_left.may_save():
                raise StoppedError(
                    f"stopped before step {self.step} was saved: {self.time_left.seconds():.0f} s are "
                    f"left, a checkpoint takes up to {self.time_left.needed_seconds:.0f} s; the same "
                    f"command continues from step {saved_step}"
                )

        agree.decided_by_first(check)

    def check_owner(self) -> None:
        """Returns if the run folder is still this start's; for the moment before it is written to.

        Raises:
            FencedError: another start has taken it.
        """
        self._fence.check()

    def report(self, data_wait_seconds: float, window_seconds: float) -> dict[str, float | int]:
        """Figures for a log entry: a rank that the others wait for, if there is one. Collective.

        Args:
            data_wait_seconds: how long this rank waited for data since the last report.
            window_seconds: how long the steps since then took.
        """
        alone = torch.zeros(self._process.world_size, dtype=torch.float64)
        alone[self._process.rank] = self._alone.read() + data_wait_seconds
        dist.all_reduce(alone)
        found = self._stragglers.judge(alone.tolist(), window_seconds)
        if found is None:
            return {}
        if found.is_news:
            share = f"{found.excess:.0%} of each step"
            say(f"rank {found.rank} is slow: all others wait for it {share}", self._process)
        return {"straggler_rank": found.rank, "straggler_excess": found.excess}

    def _save_seconds(self) -> float:
        return max(self.time_left.save_seconds, self._checkpoints.save_seconds)


def _end(limit_seconds: float) -> float | None:
    """When this start is over, seconds since 1970; None for when it is done."""
    ends = [job_end(os.environ), time.time() + limit_seconds if limit_seconds else None]
    return min((end for end in ends if end is not None), default=None)


class _DeviceSteps:
    """Counts the steps that a GPU has done, which the host runs ahead of."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pending: deque[torch.cuda.Event] = deque()
        self._num_done = 0

    def queued(self) -> None:
        """A step has been queued. No host sync."""
        if self._is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._pending.append(event)
            while len(self._pending) > 1 and self._pending[0].query():
                self._drop()

    def done(self) -> int:
        """How many are done. From the watchdog's thread; never waits."""
        return self._num_done + sum(event.query() for event in tuple(self._pending))

    def _drop(self) -> None:
        self._pending.popleft()
        self._num_done += 1
