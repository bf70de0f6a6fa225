"""Which sample is at a position of the endless training stream: a pure function, nothing to save.

An epoch lays all chunks (runs of neighbouring samples of a shard) end to end in a random order and cuts the
result into lanes; position q of the epoch is on lane q mod num_lanes. Each lane is shuffled again inside
windows as long as a chunk. A rank that takes every W-th position so follows num_lanes / W lanes, each of
which reads its shards front to back, and ranks do not meet in a shard except where two lanes touch.

World size and workers do not appear anywhere in here: they cannot change what is trained on.
"""

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime.hashing import Stream, hash_counters

Int64s = npt.NDArray[np.int64]

NUM_LANES = 64
CHUNK_BYTES = 2 * 2**20
"""One request to an object store. Long enough to be worth its cost (a millisecond of a core), and short
enough that a single rank, which follows every lane, holds all that it is in the middle of in 128 MiB."""
MAX_CHUNK_SAMPLES = 1024
CHUNKS_PER_LANE = 8
MAX_CHUNKS = 2 * 2**20
"""Bounds memory: an epoch keeps 12 bytes a chunk."""
NUM_CACHED_EPOCHS = 2
"""A global batch can hold the end of one epoch and the start of the next."""


@dataclass(frozen=True)
class _Epoch:
    """Chunks of one epoch in their order, and the slot behind each."""

    chunks: npt.NDArray[np.integer]
    slot_ends: Int64s


def default_chunk_samples(num_samples: int, num_bytes: int | None = None, num_lanes: int = NUM_LANES) -> int:
    """Samples of a chunk: several chunks a lane, so that small corpora are well shuffled too.

    Args:
        num_samples: of the corpus.
        num_bytes: of its tars, where known.
        num_lanes: of the plan.
    """
    longest = MAX_CHUNK_SAMPLES if num_bytes is None else CHUNK_BYTES * num_samples // max(1, num_bytes)
    return max(1, min(longest, num_samples // (num_lanes * CHUNKS_PER_LANE)), -(-num_samples // MAX_CHUNKS))


# Threads of a loader share a plan: another thread may drop an entry that this one has just seen. A lock could
# be held by another thread while a worker process is forked.
def _mark_used(cache: OrderedDict[Any, Any], key: Any) -> None:
    """Make an entry the last one to be dropped."""
    with suppress(KeyError):
        cache.move_to_end(key)


def _drop_oldest(cache: OrderedDict[Any, Any]) -> None:
    """Drop the entry that was used least recently."""
    with suppress(KeyError):
        cache.popitem(last=False)


class Plan:
    """Position -> (shard, index): every sample exactly once an epoch, for ever.

    Memory grows with the number of chunks (16 bytes each and epoch), not with samples; the cost of a position
    does not depend on how far it is from 0.

    Args:
        shard_sizes: samples of each shard, any may be 0.
        seed: run.seed.
        num_lanes: reading fronts; ranks stay out of each other's shards if the world size divides it.
        chunk_samples: neighbours that are read together; None takes `default_chunk_samples`.
        window_chunks: length in chunks of the windows in which a lane is shuffled.

    Raises:
        DataError: no samples at all.
    """

    def __init__(
        self,
        shard_sizes: npt.ArrayLike,
        *,
        seed: int,
        num_lanes: int = NUM_LANES,
        chunk_samples: int | None = None,
        window_chunks: int = 1,
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(sizes.sum())
        if self.num_samples == 0:
            raise DataError(f"no samples in {len(sizes)} shards: there is nothing to train on")
        self.seed = seed
        self.num_lanes = min(num_lanes, self.num_samples)
        self.chunk_samples = chunk_samples or default_chunk_samples(self.num_samples, num_lanes=num_lanes)
        self.window_samples = window_chunks * self.chunk_samples
        self._sizes = sizes
        self._chunk_ends = np.cumsum(-(-sizes // self.chunk_samples))  # one entry a shard
        self._forget()

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], Int64s]:
        """Where the samples at some positions lie.

        Args:
            positions: int64, non-negative, of any order and any epochs.

        Returns:
            shard (int32) and index inside the shard (int64), of the positions' length.
        """
        flat = np.asarray(positions, np.int64)
        assert flat.ndim == 1
        assert flat.size == 0 or flat.min() >= 0
        shards = np.empty(flat.shape, np.int32)
        indices = np.empty(flat.shape, np.int64)
        epochs, places = np.divmod(flat, self.num_samples)
        for epoch in np.unique(epochs):
            where = epochs == epoch
            slots = self._slots(int(epoch), places[where])
            shards[where], indices[where] = self._samples(self._epoch(int(epoch)), slots)
        return shards, indices

    def _slots(self, epoch: int, places: Int64s) -> Int64s:
        """Slot of each place of an epoch: its lane, and the shuffle inside the lane's window."""
        share, num_longer = divmod(self.num_samples, self.num_lanes)
        lanes = places % self.num_lanes
        lane_starts = lanes * share + np.minimum(lanes, num_longer)
        windows, inside = np.divmod(places // self.num_lanes, self.window_samples)
        window_starts = lane_starts + windows * self.window_samples
        lane_ends = lane_starts + share + (lanes < num_longer)
        lengths = np.minimum(self.window_samples, lane_ends - window_starts)
        starts, first, group = np.unique(window_starts, return_index=True, return_inverse=True)
        orders = self._shuffled(epoch, starts, lengths[first])
        order_starts = np.cumsum([0, *(len(order) for order in orders[:-1])])
        return window_starts + np.concatenate(orders)[order_starts[group] + inside]

    def _samples(self, epoch: _Epoch, slots: Int64s) -> tuple[Int64s, Int64s]:
        ranks = np.searchsorted(epoch.slot_ends, slots, side="right")
        chunks = epoch.chunks[ranks]
        shards, chunk_starts, lengths = self._chunk_places(chunks)
        return shards, chunk_starts + slots - (epoch.slot_ends[ranks] - lengths)

    def _chunk_places(self, chunks: npt.NDArray[np.integer]) -> tuple[Int64s, Int64s, Int64s]:
        """Shard, first sample in it and number of samples of each chunk."""
        shards = np.searchsorted(self._chunk_ends, chunks, side="right")
        sizes = self._sizes[shards]
        num_chunks = -(-sizes // self.chunk_samples)
        starts = (chunks - (self._chunk_ends[shards] - num_chunks)) * self.chunk_samples
        return shards, starts, np.minimum(self.chunk_samples, sizes - starts)

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            num_chunks = int(self._chunk_ends[-1])
            first_counter = np.array([epoch * num_chunks])
            (chunks,) = self._permutations(Stream.CHUNK_ORDER, first_counter, num_chunks)
            found = self._epochs[epoch] = _Epoch(chunks, np.cumsum(self._chunk_places(chunks)[2]))
            if len(self._epochs) > NUM_CACHED_EPOCHS:
                _drop_oldest(self._epochs)
        _mark_used(self._epochs, epoch)
        return found

    def _shuffled(self, epoch: int, starts: Int64s, lengths: Int64s) -> list[npt.NDArray[np.integer]]:
        """The order inside some windows, given their first slots and lengths."""
        keys = [(epoch, start) for start in starts.tolist()]
        found = [self._windows.get(key) for key in keys]
        new = np.array([order is None for order in found])
        for length in np.unique(lengths[new]).tolist():
            alike = np.flatnonzero(new & (lengths == length))
            for some in np.split(alike, range(self.num_lanes, len(alike), self.num_lanes)):
                first_counters = epoch * self.num_samples + starts[some]
                orders = self._permutations(Stream.WINDOW_ORDER, first_counters, length)
                for window, order in zip(some.tolist(), orders, strict=True):
                    found[window] = self._windows[keys[window]] = order.copy()
        for key in keys:
            _mark_used(self._windows, key)
        while len(self._windows) > 2 * self.num_lanes:  # each has one in use, and soon the next one
            _drop_oldest(self._windows)
        return [order for order in found if order is not None]

    def _permutations(self, stream: Stream, first_counters: Int64s, length: int) -> npt.NDArray[np.integer]:
        """Random orders of 0..length-1, a row for each counter, of which `length` are used from there on.

        Counters never repeat, and distinct counters have distinct hashes.
        """
        counters = first_counters[:, None] + np.arange(length)
        orders = np.argsort(hash_counters(self.seed, stream, counters), axis=1)
        return orders.astype(np.int32 if length < 2**31 else np.int64)

    def _forget(self) -> None:
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], npt.NDArray[np.integer]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # What is cached is a function of the rest: a worker process works it out for itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_epochs", "_windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
