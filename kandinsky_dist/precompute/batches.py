"""The samples of one shard, read and decoded by threads, in batches that depend on nothing but the shard."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky_dist.data.aspects import NUM_ASPECTS, WHOLE
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.rows import Rows, Views
from kandinsky_dist.data.storage import Storage
from kandinsky_dist.data.tables import Place, Tables
from kandinsky_dist.errors import SampleError

NUM_AHEAD = 2
"""Batches that are being decoded behind the one that is next."""


@dataclass(frozen=True)
class ShardSamples:
    """The samples of a shard that belong to the corpus, in its order.

    Attributes:
        keys, widths, heights: of each, sides in pixels as the index has them.
        aspects: bucket by which each is cut, WHOLE where all are squares.
    """

    keys: list[str]
    widths: list[int]
    heights: list[int]
    aspects: list[int]


@dataclass(frozen=True)
class Decoded:
    """Samples that are ready to be encoded.

    Attributes:
        indices: of all of them in the shard's samples, damaged ones included.
        damage: index -> what is wrong with it.
        batch: of those that are whole, or None.
    """

    indices: Sequence[int]
    damage: dict[int, str]
    batch: Batch | None


class ShardReader:
    """Reads and decodes the samples of shards.

    Args:
        manifest: of the corpus.
        storage: of the corpus.
        views: what the encoders want.
        pool: threads that decode.
        batch_size: samples a batch; the last one of a shard or bucket may be shorter.
        aspect_buckets: whether each batch is of one aspect bucket, in place of squares.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: Storage,
        views: Views,
        pool: ThreadPoolExecutor,
        *,
        batch_size: int,
        aspect_buckets: bool,
    ) -> None:
        self._manifest = manifest
        self._storage = storage
        self._views = views
        self._pool = pool
        self._batch_size = batch_size
        self._aspect_buckets = aspect_buckets
        fetch: Callable[[str], bytes] | None = None
        if any(is_remote(manifest.sidecar(shard)) for shard in range(len(manifest))):
            from kandinsky_dist.data.remote.fetch import fetch_whole as fetch
        self._tables = Tables(manifest, fetch)

    def samples(self, shard: int) -> ShardSamples:
        """What is known of a shard's samples without reading them."""
        index, selected = self._tables[shard].index, self._manifest.selected(shard)
        rows = np.arange(len(index)) if selected is None else selected.astype(np.int64)
        aspects = index.aspects_N[rows] if self._aspect_buckets else np.full(len(rows), WHOLE)
        return ShardSamples(
            [index.keys_N[row] for row in rows.tolist()],
            index.widths_N[rows].tolist(),
            index.heights_N[rows].tolist(),
            aspects.tolist(),
        )

    def batches(self, shard: int, samples: ShardSamples) -> Generator[Decoded, None, None]:
        """All samples of a shard.

        Raises:
            DataError: the shard is gone, was replaced, or cannot be read.
        """
        lists = list(self._lists(samples))
        if self._storage.read_ahead_bytes:
            places = [Place(shard, index) for indices, _ in lists for index in indices]
            self._storage.expect(places, self._views.extensions)
        pending: deque[tuple[Sequence[int], Rows, list[Future[str]]]] = deque()
        for indices, aspect in lists:
            rows = Rows(self._views, np.array(indices, np.int64), aspect)
            futures = [
                self._pool.submit(self._fill, rows, row, shard, index) for row, index in enumerate(indices)
            ]
            pending.append((indices, rows, futures))
            if len(pending) > NUM_AHEAD:
                yield _decoded(*pending.popleft())
        while pending:
            yield _decoded(*pending.popleft())

    def _lists(self, samples: ShardSamples) -> Iterator[tuple[Sequence[int], int]]:
        """Indices of each batch's samples, and their bucket."""
        aspects = np.array(samples.aspects)
        for aspect in range(NUM_ASPECTS) if self._aspect_buckets else [WHOLE]:
            indices = np.flatnonzero(aspects == aspect).tolist()
            for first in range(0, len(indices), self._batch_size):
                yield indices[first : first + self._batch_size], aspect

    def _fill(self, rows: Rows, row: int, shard: int, index: int) -> str:
        """Reads and decodes one sample; what is wrong with it, or nothing."""
        try:
            sample = self._storage.read(Place(shard, index), self._views.extensions)
            rows.put(row, sample, self._manifest.name(shard, sample.key))
        except SampleError as error:
            return str(error)
        return ""


def _decoded(indices: Sequence[int], rows: Rows, futures: Sequence[Future[str]]) -> Decoded:
    found = [future.result() for future in futures]
    damage = {index: said for index, said in zip(indices, found, strict=True) if said}
    whole = [row for row, said in enumerate(found) if not said]
    batch = rows.finish([]) if whole else None
    if batch is not None and damage:
        batch = _part(batch, whole)
    return Decoded(indices, damage, batch)


def _part(batch: Batch, rows: list[int]) -> Batch:
    """Some of a batch's samples."""
    chosen: dict[str, Any] = {
        item.name: value[torch.tensor(rows)]
        for item in fields(batch)
        if isinstance(value := getattr(batch, item.name), Tensor)
    }
    return replace(batch, keys=[batch.keys[row] for row in rows], **chosen)
