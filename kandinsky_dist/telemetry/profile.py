"""What host and device did in chosen steps: torch's trace, and on a GPU how its memory was used.

The parts of a step are ranges of the trace, named "data", "encoders", "forward", "backward", "optimizer" and
"ema"; the first two are those of the step after.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from kandinsky_dist.config.schema import TelemetryConfig
from kandinsky_dist.config.stretches import stretches
from kandinsky_dist.runtime.process import Process

MAX_MEMORY_EVENTS = 1_000_000
"""Allocations and releases that a snapshot remembers, with where they come from: the last ones."""


class Profiler:
    """Writes FOLDER/steps_FIRST_LAST_rank_N.json.gz for each stretch of chosen steps that this rank reaches.

    Beside it, on a GPU, lies memory_FIRST_LAST_rank_N.pickle, for https://pytorch.org/memory_viz.

    Args:
        telemetry: names the steps and ranks.
        folder: made with the first file.
        process: this one.
        pause: taken while files are written, so that no figure counts that.
    """

    def __init__(
        self,
        telemetry: TelemetryConfig,
        folder: Path,
        process: Process,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._folder = folder
        self._stretches = stretches(telemetry.profile) if process.rank in telemetry.profile_ranks else []
        self._rank = process.rank
        self._is_cuda = process.device.type == "cuda"
        self._pause = pause
        self._profile: profile | None = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds what a step computes."""
        stretch = next((stretch for stretch in self._stretches if number in stretch), None)
        if stretch is None:
            yield
            return
        if self._profile is None:
            self._start(number)
        yield
        self._last = number
        if number == stretch[-1]:
            self.close()

    def close(self) -> None:
        """Writes what there is of a stretch that has begun."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        with self._pause():
            running.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{self._first:08d}_{self._last:08d}_rank_{self._rank:05d}"
            running.export_chrome_trace(str(self._folder / f"steps_{name}.json.gz"))
            if self._is_cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self, number: int) -> None:
        self._first = self._last = number
        activities = [ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        self._profile = profile(activities=activities)
        self._profile.start()
