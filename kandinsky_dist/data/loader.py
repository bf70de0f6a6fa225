"""Batches on the device, in the run's order, whatever the world size and the number of workers.

Letters of shapes: B samples of a micro-batch.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.workers import (
    WorkerDiedError,
    next_from,
    quiet_about_cores,
    start_worker,
    worker_processes,
)
from kandinsky_dist.errors import DataError, KandinskyError

THREADS_PER_PROCESS = 4
"""More would wait for one another's turns at the interpreter's lock."""
MAX_DEATHS = 3
"""Worker processes in a row that may die before one of them hands over a batch."""

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where samples come from.

    Attributes:
        in_process: whether `batches` takes so little of the interpreter's time that worker processes would
            only add the handing over.
    """

    in_process: bool

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch, or None where there is no end."""
        ...

    def batches(self, lists: Iterable[Sequence[int]], num_threads: int) -> Generator[Batch, None, None]:
        """Batches of some lists of positions, in the lists' order, on the host."""
        ...


class Loader:
    """Feeds one rank of `world_size`.

    Rank r takes the positions p of a global batch with p = r (mod world_size), cut in order into
    micro-batches: what all ranks together see at a step does not depend on how many they are. Nor does it
    where samples of one length are put together: the global batch, sorted by length, is cut into
    micro-batches, of which rank r takes those numbered r (mod world_size), so that all have as much to do.

    Attributes:
        data_wait_seconds: time spent waiting for data since the start, for the meter.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        device: torch.device | str,
        lengths: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]] | None = None,
    ) -> None:
        """Sets up the loader.

        Args:
            source: of the samples.
            global_batch_size, micro_batch_size: samples of a step of all ranks, and of a forward pass of one.
            rank, world_size: of this process.
            num_workers: decoding threads.
            device: that batches are put on.
            lengths: of the samples at some positions, the same on every rank, to put those of one length into
                one micro-batch in training; None takes them as they come.
        """
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.source = source
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_micro = global_batch_size // (micro_batch_size * world_size)
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.device = torch.device(device)
        self._lengths = lengths
        self.data_wait_seconds = 0.0

    def steps(self, samples_consumed: int) -> Generator[list[Batch], None, None]:
        """Endless: the micro-batches of one optimizer step after another, on the device.

        Args:
            samples_consumed: samples, over all ranks, that training has already seen.

        Raises:
            DataError: a storage that fails, or worker processes that die again and again.
        """
        batches = self._on_device(self._batches(partial(self._training_lists, samples_consumed)))
        try:
            while True:
                yield [self._timed_next(batches) for _ in range(self.num_micro)]
        finally:
            batches.close()

    def held_out(self, num_samples: int) -> Generator[tuple[Batch, Tensor], None, None]:
        """One pass over the first samples of the order, as many batches on every rank.

        Args:
            num_samples: over all ranks; at most one epoch is taken.

        Yields:
            a batch and weights_B (fp32, on the device): 1 for a sample, 0 for a repeated one that only fills
            the batch. Over all ranks, the weights sum to the number of samples.
        """
        num_samples = min(num_samples, self.source.num_samples or num_samples)
        stride = self.micro_batch_size * self.world_size
        numbers = np.arange(-(-num_samples // stride) * stride).reshape(
            -1, self.micro_batch_size, self.world_size
        )
        mine = numbers[:, :, self.rank]
        lists = np.minimum(mine, num_samples - 1).tolist()
        weights = torch.from_numpy((mine < num_samples).astype(np.float32)).to(self.device)
        batches = self._on_device(self._batches(lambda: iter(lists)))
        try:
            for weights_B in weights:
                yield self._timed_next(batches), weights_B
        finally:
            batches.close()

    def _training_lists(self, samples_consumed: int) -> Iterator[Sequence[int]]:
        """Positions of this rank's micro-batches, for ever."""
        base = samples_consumed
        while True:
            if self._lengths is None:
                mine = range(base + self.rank, base + self.global_batch_size, self.world_size)
                for first in range(0, len(mine), self.micro_batch_size):
                    yield mine[first : first + self.micro_batch_size]
            else:
                positions = np.arange(base, base + self.global_batch_size)
                # The longest first: what does not fit into memory shows at once.
                by_length = positions[np.argsort(-self._lengths(positions), kind="stable")]
                yield from by_length.reshape(-1, self.micro_batch_size)[self.rank :: self.world_size].tolist()
            base += self.global_batch_size

    def _timed_next(self, batches: Iterator[Batch]) -> Batch:
        start = time.monotonic()
        try:
            return next(batches)
        finally:
            self.data_wait_seconds += time.monotonic() - start

    def _batches(self, lists: Callable[[], Iterator[Sequence[int]]]) -> Generator[Batch, None, None]:
        """Batches on the host, in the order of the lists; a worker that dies is replaced where it was."""
        if self.num_workers == 0 or self.source.in_process:
            for batch in self.source.batches(lists(), self.num_workers):
                yield batch.pin_memory() if self.device.type == "cuda" else batch
            return
        num_delivered, num_deaths = 0, 0
        while True:
            try:
                for batch in self._from_workers(partial(_from, lists, num_delivered)):
                    yield batch
                    num_delivered, num_deaths = num_delivered + 1, 0
                return
            except Exception as death:  # not by its class, which is gone when the interpreter shuts down
                if not isinstance(death, WorkerDiedError):
                    raise
                num_deaths += 1
                if num_deaths == MAX_DEATHS:
                    raise
                logger.warning("%s; replaced, with nothing lost or repeated", death)

    def _from_workers(self, lists: Callable[[], Iterator[Sequence[int]]]) -> Generator[Batch, None, None]:
        num_processes = -(-self.num_workers // THREADS_PER_PROCESS)
        with quiet_about_cores():
            loader = DataLoader(
                _Assembling(self.source, lists, -(-self.num_workers // num_processes)),
                batch_size=None,
                num_workers=num_processes,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=start_worker,
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

    def _on_device(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """Copies to the device; on a GPU beside the computation that is under way."""
        try:
            if self.device.type != "cuda":
                for batch in batches:
                    yield batch.to(self.device)
                return
            stream = torch.cuda.Stream(self.device)
            for batch in batches:
                with torch.cuda.stream(stream):
                    copied = batch.to(self.device, non_blocking=True)
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(stream)  # on the device: no host sync
                for tensor in copied.tensors():
                    tensor.record_stream(
                        current
                    )  # else the copy stream could reuse its memory while it is read
                yield copied
        finally:
            batches.close()


class _Assembling(IterableDataset):
    """What a worker process iterates over: every num_workers-th batch, so that all of them take turns."""

    def __init__(
        self, source: Source, lists: Callable[[], Iterator[Sequence[int]]], num_threads: int
    ) -> None:
        self._source = source
        self._lists = lists
        self._num_threads = num_threads

    def __iter__(self) -> Iterator[Batch | KandinskyError]:
        worker = get_worker_info()
        assert worker is not None
        mine = islice(self._lists(), worker.id, None, worker.num_workers)
        try:
            yield from self._source.batches(mine, self._num_threads)
        except DataError as error:
            # As a value: torch would wrap what a worker raises in a traceback's text.
            yield error.with_traceback(None)


def _from(lists: Callable[[], Iterable[Sequence[int]]], first: int) -> Iterator[Sequence[int]]:
    return islice(lists(), first, None)
