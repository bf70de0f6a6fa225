"""Batches on the device, in the plan's order, whatever the world size and the number of workers.

Letters of shapes: B samples of a micro-batch.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kandinsky_dist.data.dataset import Batch, ShardDataset
from kandinsky_dist.errors import DataError, KandinskyError


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

    def steps(self, samples_consumed: int) -> Iterator[list[Batch]]:
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

    def held_out(self, num_samples: int) -> Iterator[tuple[Batch, Tensor]]:
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

    def _micro_batches(self, positions: Any, num_workers: int) -> Iterator[Batch]:
        """Batches on the host, in the order of `positions` (an iterable of lists)."""
        loader = DataLoader(
            _ErrorsAsValues(self.dataset),
            batch_sampler=positions,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker if num_workers else None,
            generator=torch.Generator(),  # its own: the default one is not ours to advance
        )
        iterator = iter(loader)
        try:
            while True:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if "DataLoader worker" not in str(error):
                        raise
                    raise DataError(_worker_death(error)) from error
                if isinstance(batch, KandinskyError):
                    raise batch
                yield batch
        finally:
            _stop_workers(iterator)

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
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
                yield _arrived(*ahead)
            ahead = arriving
        if ahead is not None:
            yield _arrived(*ahead)


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
    """Hands our own errors over as results: raised in a worker, torch would wrap them in a traceback's text."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> Batch | KandinskyError:
        try:
            return self._dataset.__getitems__(positions)
        except KandinskyError as error:
            return error.with_traceback(None)


def _unchanged(batch: Any) -> Any:
    return batch


def _arrived(batch: Batch, event: torch.cuda.Event) -> Batch:
    """Makes the current stream wait for a copy, on the device; no host sync."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in batch.tensors():
        tensor.record_stream(current)  # its memory must not be reused by the copy stream before it was read
    return batch


def _start_worker(worker: int) -> None:
    # SLURM and a terminal signal every process of a job; whether to stop is for the training process to
    # decide, which still needs the batches of the step that it is in.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _stop_workers(iterator: Any) -> None:
    """Ends the workers now, not when the garbage collector finds the iterator."""
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is not None:
        stop()


def _worker_death(error: RuntimeError) -> str:
    first = str(error).splitlines()[0].rstrip(". ")
    return f"{first}; if it ran out of memory or /dev/shm, lower data.num_workers or data.micro_batch_size"
