"""Micro-batches put together by threads, in their order.

Reading and decoding release the interpreter's lock, so threads of one process share what is open, read ahead
and known of the corpus, which processes would each have to hold for themselves.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.dataset import Assembly, ShardDataset
from kandinsky_dist.data.order import Places
from kandinsky_dist.data.tables import Place

NUM_AHEAD = 2
"""Micro-batches that are being put together behind the one that is next."""


def assembled(
    dataset: ShardDataset, lists: Iterable[Sequence[int]], num_threads: int
) -> Generator[Batch, None, None]:
    """Batches of some lists of positions, in the lists' order.

    Args:
        dataset: what the positions are of.
        lists: positions of each batch; may be endless.
        num_threads: that decode; 0 decodes where the batch is asked for.

    Raises:
        DataError: as `Assembly.fill`, when the batch's turn has come.
    """
    begun = (Assembly(dataset, positions_B, places) for positions_B, places in _expected(dataset, lists))
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


def _finished(assembly: Assembly, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return assembly.finish()


def _expected(
    dataset: ShardDataset, lists: Iterable[Sequence[int]]
) -> Iterator[tuple[npt.NDArray[np.int64], Places]]:
    """Locates batches, and tells a storage that reads ahead which samples come next.

    It is told by halves of what it may hold: the more it knows at a time, the more neighbours it can fetch at
    once, and while one half is used up the next one is on its way.
    """
    storage, manifest = dataset.storage, dataset.order.manifest
    mean_bytes = max(1, int(manifest.num_bytes_S.sum()) // manifest.num_samples)
    half = storage.read_ahead_bytes // 2 // mean_bytes
    remaining = iter(lists)
    known: deque[tuple[npt.NDArray[np.int64], Places]] = deque()
    num_known = 0
    while True:
        more: list[Place] = []
        while num_known <= half and len(more) <= half:
            positions = next(remaining, None)
            if positions is None:
                break
            positions_B = np.asarray(positions, np.int64)
            known.append((positions_B, dataset.order.locate(positions_B)))
            more += known[-1][1].each()
        if more and storage.read_ahead_bytes:
            storage.expect(more, dataset.views.extensions)
        num_known += len(more)
        if not known:
            return
        num_known -= len(known[0][0])
        yield known.popleft()
