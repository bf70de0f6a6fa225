"""Batches on the device, in the plan's order, whatever the world size and the number of workers.

Letters of shapes: B samples of a micro-batch.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kandinsky_dist.data.dataset import Batch, ShardDataset
from kandinsky_dist.data.workers import next_from, start_worker, worker_processes
from kandinsky_dist.errors import KandinskyError


class Loader:
    """Feeds one rank of `world_size`.

    Rank r takes the positions p of a global batch with p = r (mod world_size), cut in order into
    micro-batches: what all ranks together see at a step does not depend on how many they are.

    Attributes:
        data_wait_seconds: time spent waiting for data since the start, for the meter.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        device: torch.device | str,
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_micro = global_batch_size // (micro_batch_size * world_size)
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.data_wait_seconds = 0.0

    def steps(self, samples_consumed: int) -> Generator[list[Batch], None, None]:
        """Endless: the micro-batches of one optimizer step after another, on the device.

        Args:
            samples_consumed: samples, over all ranks, that training has already seen.

        Raises:
            DataError: a sample that cannot be read, or a worker process that died.
        """
        micro_batches = self._on_device(
            self._micro_batches(_TrainingPositions(self, samples_consumed), self.num_workers)
        )
        try:
            while True:
                yield [self._timed_next(micro_batches) for _ in range(self.num_micro)]
        finally:
            micro_batches.close()

    def held_out(self, num_samples: int) -> Generator[tuple[Batch, Tensor], None, None]:
        """One pass over the first samples of the plan, as many batches on every rank.

        Args:
            num_samples: over all ranks; at most one epoch is taken.

        Yields:
            a batch and weights_B (fp32, on the device): 1 for a sample, 0 for a repeated one that only fills
            the batch. Over all ranks, the weights sum to the number of samples.
        """
        num_samples = min(num_samples, self.dataset.plan.num_samples)
        stride = self.micro_batch_size * self.world_size
        numbers = np.arange(-(-num_samples // stride) * stride).reshape(
            -1, self.micro_batch_size, self.world_size
        )
        mine = numbers[:, :, self.rank]
        positions = np.minimum(mine, num_samples - 1).tolist()
        weights = torch.from_numpy((mine < num_samples).astype(np.float32)).to(self.device)
        batches = self._on_device(self._micro_batches(positions, min(self.num_workers, len(positions))))
        try:
            for weights_B in weights:
                yield self._timed_next(batches), weights_B
        finally:
            batches.close()

    def _timed_next(self, batches: Iterator[Batch]) -> Batch:
        start = time.monotonic()
        try:
            return next(batches)
        finally:
            self.data_wait_seconds += time.monotonic() - start

    def _micro_batches(self, positions: Any, num_workers: int) -> Generator[Batch, None, None]:
        """Batches on the host, in the order of `positions` (an iterable of lists)."""
        loader = DataLoader(
            _ErrorsAsValues(self.dataset),
            batch_sampler=positions,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=start_worker if num_workers else None,
            generator=torch.Generator(),  # its own: the default one is not ours to advance
        )
        with worker_processes(loader) as iterator:
            while True:
                try:
                    batch = next_from(iterator)
                except StopIteration:
                    return
                if isinstance(batch, KandinskyError):
                    raise batch
                yield batch

    def _on_device(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Copies to the device; on a GPU one micro-batch ahead, beside the computation."""
        if self.device.type != "cuda":
            for batch in batches:
                yield batch.to(self.device)
            return
        stream = torch.cuda.Stream(self.device)
        ahead: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(stream):
                copied = batch.to(self.device, non_blocking=True)
            arriving = copied, stream.record_event()
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = arriving
        if ahead is not None:
            yield self._arrived(*ahead)

    def _arrived(self, batch: Batch, event: torch.cuda.Event) -> Batch:
        """Makes the current stream wait for a copy, on the device; no host sync."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in batch.tensors():
            tensor.record_stream(current)  # else the copy stream could reuse its memory while it is read
        return batch


class _TrainingPositions:
    """Endless lists of the positions of one rank's micro-batches."""

    def __init__(self, loader: Loader, samples_consumed: int) -> None:
        self._loader = loader
        self._start = samples_consumed

    def __iter__(self) -> Iterator[list[int]]:
        loader, base = self._loader, self._start
        while True:
            mine = range(base + loader.rank, base + loader.global_batch_size, loader.world_size)
            for first in range(0, len(mine), loader.micro_batch_size):
                yield list(mine[first : first + loader.micro_batch_size])
            base += loader.global_batch_size


class _ErrorsAsValues(Dataset):
    """Hands our own errors over as results: torch would wrap what a worker raises in a traceback's text."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> Batch | KandinskyError:
        try:
            return self._dataset.__getitems__(positions)
        except KandinskyError as error:
            return error.with_traceback(None)


def _unchanged(batch: Any) -> Any:
    return batch
