"""Samples of a run's order, read and decoded by threads; a damaged one is replaced by a rule, not by chance.

Reading and decoding release the interpreter's lock, so threads of one process share what is open, read ahead
and known of the corpus, which processes would each have to hold for themselves.

Letters of shapes: B samples.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order, Places
from kandinsky_dist.data.storage import Sample, Storage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError, SampleError

NUM_AHEAD = 2
"""Micro-batches that are being put together behind the one that is next."""


class Rows(Protocol):
    """A batch that is being put together: rows in any order and by several threads, then `finish`."""

    positions_B: npt.NDArray[np.int64]

    def put(self, row: int, sample: Sample, name: str) -> None:
        """Takes a sample for a row; raises SampleError where it is damaged, and can be asked again."""
        ...

    def finish(self, bad_samples: Sequence[BadSample]) -> Batch:
        """The batch, every row of which has been put."""
        ...


class Views(Protocol):
    """What is wanted of each sample."""

    @property
    def extensions(self) -> frozenset[str]:
        """Members of a sample that are read."""
        ...

    def rows(self, positions_B: npt.NDArray[np.int64], aspect: int) -> Rows:
        """A batch to be put together, all of one aspect bucket."""
        ...


class ShardDataset:
    """What a run is trained on: which samples, from where, seen how."""

    in_process = False

    def __init__(self, order: Order, views: Views, storage: Storage) -> None:
        self.order = order
        self.views = views
        self.storage = storage

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.order.num_samples

    def batches(self, lists: Iterable[Sequence[int]], num_threads: int) -> Generator[Batch, None, None]:
        """Batches of some lists of positions, in the lists' order.

        Args:
            lists: positions of each batch; may be endless.
            num_threads: that read and decode; 0 does so where the batch is asked for.

        Raises:
            DataError: as `Assembly.fill`, when the batch's turn has come.
        """
        begun = (Assembly(self, positions_B, places) for positions_B, places in self._located(lists))
        if num_threads == 0:
            for assembly in begun:
                for row in range(len(assembly)):
                    assembly.fill(row)
                yield assembly.finish()
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        pending: deque[tuple[Assembly, list[Future[None]]]] = deque()
        try:
            for assembly in begun:
                pending.append((assembly, [pool.submit(assembly.fill, row) for row in range(len(assembly))]))
                if sum(len(futures) for _, futures in pending) > NUM_AHEAD * max(num_threads, len(assembly)):
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _located(self, lists: Iterable[Sequence[int]]) -> Iterator[tuple[npt.NDArray[np.int64], Places]]:
        """Locates batches, and tells a storage that reads ahead which samples come next.

        It is told by as much at a time as it may hold, when that much is still to come: the more it knows,
        the more neighbours it can fetch at once, and while one part is used up the next one is on its way.
        """
        manifest = self.order.manifest
        mean_bytes = max(1, int(manifest.num_bytes_S.sum()) // manifest.num_samples)
        part = self.storage.read_ahead_bytes // mean_bytes
        remaining = iter(lists)
        known: deque[tuple[npt.NDArray[np.int64], Places]] = deque()
        num_known = 0
        while True:
            more: list[Place] = []
            while num_known <= part and len(more) <= part:
                positions = next(remaining, None)
                if positions is None:
                    break
                positions_B = np.asarray(positions, np.int64)
                known.append((positions_B, self.order.locate(positions_B)))
                more += known[-1][1].each()
            if more and self.storage.read_ahead_bytes:
                self.storage.expect(more, self.views.extensions)
            num_known += len(more)
            if not known:
                return
            num_known -= len(known[0][0])
            yield known.popleft()


class Assembly:
    """A batch on its way from the storage: rows in any order and by several threads, then `finish`."""

    def __init__(self, dataset: ShardDataset, positions_B: npt.NDArray[np.int64], places: Places) -> None:
        (aspect,) = set(places.aspects_B.tolist())  # the order gives a global batch of one bucket
        self._dataset = dataset
        self._places = places.each()
        self._rows = dataset.views.rows(positions_B, aspect)
        self._bad: dict[int, list[BadSample]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def fill(self, row: int) -> None:
        """Reads and decodes one sample; a damaged one is replaced by the order's next attempt.

        Raises:
            DataError: the storage fails, or replacement after replacement is damaged too.
        """
        order, storage = self._dataset.order, self._dataset.storage
        position = int(self._rows.positions_B[row])
        place, failures = self._places[row], list[str]()
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                (place,) = order.locate([position], attempt).each()
            try:
                sample = storage.read(place, self._dataset.views.extensions)
                name = order.manifest.name(place.shard, sample.key)
                self._rows.put(row, sample, name)
            except SampleError as error:
                failures.append(str(error))
                continue
            self._bad[row] = [BadSample(position, failure, name) for failure in failures]
            return
        raise DataError(
            f"{NUM_ATTEMPTS} samples in a row cannot be used, at position {position}, first {failures[0]}; "
            "kandinsky-dist data check says what is wrong with the corpus"
        )

    def finish(self) -> Batch:
        """The batch, every row of which has been filled."""
        return self._rows.finish([bad for row in sorted(self._bad) for bad in self._bad[row]])


def _finished(assembly: Assembly, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return assembly.finish()
