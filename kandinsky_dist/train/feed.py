"""The data of one step after another, agreed on by all ranks: all have theirs, or all stop."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import record_function

from kandinsky_dist.checkpoint.layout import RunState
from kandinsky_dist.config.schema import DataConfig
from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.errors import DataError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import cpu_group

MIN_JUDGED_SAMPLES = 1000
"""A share of damaged samples says little of a corpus before so many have been seen."""


@dataclass(frozen=True)
class StepData:
    """What a step is made of, or why it cannot be made; the latter and the counts are the same on all ranks.

    Attributes:
        microbatches: this rank's, on the device; empty if some rank has none.
        prepared: the same after the frozen encoders.
        bad_samples: damaged samples of the step that were replaced, of all ranks.
        failure: why a rank has no data.
        is_stopped: whether some process was asked to stop.
    """

    microbatches: list[Batch]
    prepared: list[Prepared]
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

    The frozen encoders have their turn with the data, one step ahead of the trained model: on a GPU on a
    stream of their own, so that they fill what training leaves idle.

    Args:
        steps: of this rank's loader; closed with the feed.
        prepare: runs the frozen encoders on a micro-batch, without a host sync.
        stop: of this process.
        device: where all of it happens.
    """

    def __init__(
        self,
        steps: Generator[list[Batch], None, None],
        prepare: Callable[[Batch], Prepared],
        stop: StopRequest,
        device: torch.device,
    ) -> None:
        self._steps = steps
        self._prepare = prepare
        self._stop = stop
        self._group = cpu_group()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which has made the encoders
        self._microbatches: list[Batch] = []
        self._prepared: list[Prepared] = []
        self._failure: DataError | None = None
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def look_ahead(self) -> None:
        """Fetches and encodes the next step's data. No host sync.

        Collective, though nobody is waited for: call on every rank.
        """
        try:
            with self._aside(), record_function("data"):
                self._microbatches = next(self._steps)
        except DataError as error:
            self._microbatches, self._failure = [], error
        num_bad = sum(len(batch.bad_samples) for batch in self._microbatches)
        counts = torch.tensor([int(self._stop.is_made), int(self._failure is not None), num_bad])
        self._pending = dist.all_reduce(counts, group=self._group, async_op=True), counts
        with self._aside(), record_function("encoders"):
            self._prepared = [self._prepare(batch) for batch in self._microbatches]

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
        microbatches, self._microbatches = self._microbatches, []
        prepared, self._prepared = self._prepared, []
        if failure is not None:
            microbatches, prepared = [], []
        self._hand_over(prepared)
        return StepData(microbatches, prepared, bad_samples, failure, is_stopped=bool(num_stops))

    def _aside(self) -> AbstractContextManager[object]:
        """Where the next step's data is made: beside the training stream, or in line where there is none."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, prepared: list[Prepared]) -> None:
        """Makes the training stream wait for what was made beside it. On the device: no host sync."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for item in prepared:
            for tensor in item.tensors():
                tensor.record_stream(current)  # else its memory could be reused while training reads it

    def close(self) -> None:
        """Ends the loader."""
        self._steps.close()
