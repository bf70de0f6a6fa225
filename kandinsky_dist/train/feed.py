"""The data of one step after another, agreed on by all ranks: all have theirs, or all stop."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from kandinsky_dist.checkpoint.layout import RunState
from kandinsky_dist.config.schema import DataConfig
from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.errors import DataError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import cpu_group

MIN_JUDGED_SAMPLES = 1000
"""A share of damaged samples says little of a corpus before so many have been seen."""


@dataclass(frozen=True)
class StepData:
    """What a step is made of, or why it cannot be made; the latter and the counts are the same on all ranks.

    Attributes:
        microbatches: this rank's, on the device; empty if some rank has none.
        bad_samples: damaged samples of the step that were replaced, of all ranks.
        failure: why a rank has no data.
        is_stopped: whether some process was asked to stop.
    """

    microbatches: list[Batch]
    bad_samples: list[BadSample]
    failure: DataError | None
    is_stopped: bool


def too_many_bad_samples(
    found: Sequence[BadSample], state: RunState, config: DataConfig, run_dir: Path
) -> DataError | None:
    """Judges how many samples were damaged so far, those found for the step after `state` included."""
    num_bad = state.num_bad_samples + len(found)
    num_samples = state.samples_consumed + config.global_batch_size
    share = config.max_bad_fraction
    if num_bad <= share * max(num_samples, MIN_JUDGED_SAMPLES):
        return None
    return DataError(
        f"{num_bad} of {num_samples} samples so far are damaged, more than data.max_bad_fraction={share} "
        f"allows, last {found[-1].reason}; they are in {run_dir / 'bad_samples.jsonl'}: mend the corpus or "
        "raise the share"
    )


class Feed:
    """Fetches a step's data beside the computation of the step before, and the ranks' agreement with it.

    A rank whose data fails must not leave the others waiting in a collective: before any of them starts a
    step, each knows that all can. The question runs over CPU tensors while the device computes.

    Args:
        steps: of this rank's loader; closed with the feed.
        stop: of this process.
    """

    def __init__(self, steps: Generator[list[Batch], None, None], stop: StopRequest) -> None:
        self._steps = steps
        self._stop = stop
        self._group = cpu_group()
        self._microbatches: list[Batch] = []
        self._failure: DataError | None = None
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def look_ahead(self) -> None:
        """Fetches the next step's data. Collective, though nobody is waited for: call on every rank."""
        try:
            self._microbatches = next(self._steps)
        except DataError as error:
            self._microbatches, self._failure = [], error
        num_bad = sum(len(batch.bad_samples) for batch in self._microbatches)
        counts = torch.tensor([int(self._stop.is_made), int(self._failure is not None), num_bad])
        self._pending = dist.all_reduce(counts, group=self._group, async_op=True), counts

    def take(self) -> StepData:
        """The data that was fetched ahead. Collective: call on every rank."""
        if self._pending is None:
            self.look_ahead()
        assert self._pending is not None
        (work, counts), self._pending = self._pending, None
        if work is not None:
            work.wait()
        num_stops, num_failures, num_bad = counts.tolist()
        if num_stops:
            self._stop.make()  # what one process was asked, all do
        bad_samples = []
        if num_bad:
            mine = [bad for batch in self._microbatches for bad in batch.bad_samples]
            found = [bad for part in agree.gather(mine) for bad in part]
            bad_samples = sorted(found, key=lambda bad: bad.position)
        failure = self._failure
        if num_failures:
            first = agree.first_error(failure)
            if failure is None and first is not None:
                failure = DataError(first[2])  # what the rank says whose data it is
        microbatches = self._microbatches if failure is None else []
        return StepData(microbatches, bad_samples, failure, is_stopped=bool(num_stops))

    def close(self) -> None:
        """Ends the loader."""
        self._steps.close()
