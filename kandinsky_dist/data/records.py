"""Members of one fixed size, read straight into the rows of a batch: for shards of encoder outputs.

A sample costs one read by the system and hardly anything else: where samples lie is worked out for thousands
at once, and no Python object is made for a sample. Threads of the process read ahead; worker processes would
spend ten times as long on handing batches over.

pread it is: a memory-mapped file is no faster where pages are touched for the first time, which is what an
epoch does (127-138k against 95-128k records of 35 KB a second, one core, page cache, Linux 6.18, which later
runs reversed), and an error of the disk would be a signal that ends the process.

Letters of shapes: B samples, R bytes of a record, W 8-byte words of one.
"""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kandinsky_dist.data.batch import BadSample
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order
from kandinsky_dist.data.record_slots import MISSING, SlotFinder, Slots
from kandinsky_dist.data.tables import Place, Tables
from kandinsky_dist.errors import DataError

Int64s = npt.NDArray[np.int64]
Check = Literal["seal", "crc32", "none"]

LOCATED_AT_ONCE = 4096
"""Positions. By batches of 256, finding the places would take a fifth of the time."""
SEAL_BYTES = 8
_SEAL_OF_NOTHING = np.uint64(0x9E3779B97F4A7C15)
"""So that a record of zeros, as a hole in a file reads, has no valid seal."""


def seals(words_BW: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """What the last word of records must be, given the others: a constant and their sum, modulo 2^64."""
    return words_BW.sum(1, dtype=np.uint64) + _SEAL_OF_NOTHING


def sealed(payloads_BR: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Records with their seals: uint8 (B, R + 8) of payloads (B, R), R a multiple of 8."""
    words_BW = np.ascontiguousarray(payloads_BR).view(np.uint64)
    return np.concatenate([words_BW, seals(words_BW)[:, None]], 1).view(np.uint8)


def record_size(manifest: Manifest, extension: str) -> int:
    """Bytes of a member of the corpus' first sample.

    Raises:
        DataError: it has no such member.
    """
    shard = int(np.flatnonzero(manifest.num_samples_S)[0])
    table = Tables(manifest)[shard]
    row = table.row(Place(shard, 0))
    members = table.index.members(row)
    if extension not in members:
        name = manifest.name(shard, table.index.keys_N[row])
        raise DataError(f"{name} has no .{extension}, which data.source=cached reads; precompute the shards")
    return members[extension][1]


@dataclass(frozen=True, eq=False)
class RecordBatch:
    """Records of some positions of the order.

    Attributes:
        records_BR: uint8 on the CPU.
        bad_samples: what had to be replaced.
    """

    positions_B: Int64s
    records_BR: Tensor
    bad_samples: tuple[BadSample, ...]
    _slots: Slots = field(repr=False)

    def __len__(self) -> int:
        return len(self.positions_B)

    def keys(self) -> list[str]:
        """Key of each sample; looked up only when somebody asks."""
        return self._slots.keys()


class RecordReader:
    """Reads the members of one extension, all of one size, at positions of an order.

    Args:
        order: of a local corpus.
        extension: of the members.
        record_bytes: their size.
        check: how damage is found. "seal": the last 8 bytes are `seals` of the others, which takes an
            eleventh of the time of "crc32", the sidecar's checksums; "none": only sizes are looked at.
    """

    def __init__(self, order: Order, extension: str, record_bytes: int, *, check: Check = "crc32") -> None:
        assert check != "seal" or record_bytes % SEAL_BYTES == 0
        self.record_bytes = record_bytes
        self._order = order
        self._extension = extension
        self._check = check
        self._finder = SlotFinder(order.manifest, extension, record_bytes)

    def read(self, positions: npt.ArrayLike, out_BR: Tensor | None = None) -> RecordBatch:
        """Reads the records at some positions, into `out_BR` if it is given (uint8, contiguous, on the CPU).

        A damaged sample is replaced by the order's next attempt.

        Raises:
            DataError: a shard is gone or was replaced, or replacement after replacement is damaged.
        """
        positions_B = np.asarray(positions, np.int64)
        if out_BR is None:
            out_BR = torch.empty(len(positions_B), self.record_bytes, dtype=torch.uint8)
        return self._read(positions_B, self._finder.find(self._order.locate(positions_B)), out_BR)

    def batches(
        self, lists: Iterable[Sequence[int] | Int64s], *, num_threads: int = 1, pin_memory: bool = False
    ) -> Generator[RecordBatch, None, None]:
        """Batches of some lists of positions, in the lists' order, each in memory of its own.

        Args:
            lists: positions of each batch; may be endless.
            num_threads: that read ahead, each at a batch of its own; 0 reads where the batch is asked for.
            pin_memory: in page-locked memory.

        Raises:
            DataError: as `read`, when the batch's turn has come.
        """

        def read(positions_B: Int64s, slots: Slots) -> RecordBatch:
            shape = len(positions_B), self.record_bytes
            return self._read(
                positions_B, slots, torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
            )

        if num_threads == 0:
            yield from (read(*job) for job in self._located(lists))
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="records")
        pending: deque[Future[RecordBatch]] = deque()
        try:
            for job in self._located(lists):
                pending.append(pool.submit(read, *job))
                if len(pending) > num_threads + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _located(self, lists: Iterable[Sequence[int] | Int64s]) -> Iterator[tuple[Int64s, Slots]]:
        """Each list with its slots, which are found for many lists at once."""
        waiting: list[Int64s] = []
        num_waiting = 0
        for positions in lists:
            waiting.append(np.asarray(positions, np.int64))
            num_waiting += len(positions)
            if num_waiting >= LOCATED_AT_ONCE:
                yield from self._found(waiting)
                waiting, num_waiting = [], 0
        if waiting:
            yield from self._found(waiting)

    def _found(self, waiting: Sequence[Int64s]) -> Iterator[tuple[Int64s, Slots]]:
        slots = self._finder.find(self._order.locate(np.concatenate(waiting)))
        start = 0
        for positions_B in waiting:
            yield positions_B, slots.part(start, start + len(positions_B))
            start += len(positions_B)

    def _read(self, positions_B: Int64s, slots: Slots, out_BR: Tensor) -> RecordBatch:
        assert out_BR.shape == (len(positions_B), self.record_bytes)
        assert out_BR.is_contiguous()
        failures = self._fill(slots, out_BR.numpy())
        bad: list[BadSample] = []
        for row in sorted(failures):
            bad += self._replace(int(positions_B[row]), row, failures[row], slots, out_BR[row : row + 1])
        return RecordBatch(positions_B, out_BR, tuple(bad), slots)

    def _replace(
        self, position: int, row: int, failure: str, slots: Slots, out_1R: Tensor
    ) -> list[BadSample]:
        """Puts the order's next usable attempt into a row."""
        failures = [failure]
        for attempt in range(1, NUM_ATTEMPTS):
            other = self._finder.find(self._order.locate(np.array([position]), attempt))
            again = self._fill(other, out_1R.numpy())
            if not again:
                slots.put(row, other)
                return [BadSample(position, reason, other.name(0)) for reason in failures]
            failures += again.values()
        raise DataError(
            f"{NUM_ATTEMPTS} samples in a row cannot be used, at position {position}, first {failures[0]}; "
            "kandinsky-dist data check says what is wrong with the corpus"
        )

    def _fill(self, slots: Slots, out_BR: npt.NDArray[np.uint8]) -> dict[int, str]:
        """Reads records into their rows, and says of those that cannot be used why."""
        size, content, preadv = self.record_bytes, out_BR.reshape(-1).data, os.preadv
        failures: dict[int, str] = {}
        if MISSING in slots.odd.values():
            slots.offsets_B.clip(0, out=slots.offsets_B)
        starts = range(0, len(content), size)
        try:
            # What is in this loop is done for each sample.
            for start, descriptor, offset in zip(
                starts, slots.descriptors(), slots.offsets_B.tolist(), strict=True
            ):
                if preadv(descriptor, (content[start : start + size],), offset) != size:
                    self._read_rest(slots, start // size, content[start : start + size], failures)
        except OSError as error:
            path = slots.shard(start // size).path
            raise DataError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error
        for row in self._damaged(slots, out_BR):
            failures.setdefault(
                row, f"{slots.name(row)}: .{self._extension} is not what was written: bytes changed"
            )
        for row, found in slots.odd.items():
            what = "is missing" if found == MISSING else f"has {found} bytes, a record has {size}"
            failures[row] = f"{slots.name(row)}: .{self._extension} {what}; precompute the shard again"
        return failures

    def _read_rest(self, slots: Slots, row: int, into: memoryview, failures: dict[int, str]) -> None:
        """A read may give less than was asked for; only at the end of the file does it give nothing."""
        done, offset = 0, int(slots.offsets_B[row])
        while done < len(into):
            num = os.preadv(slots.shard(row).descriptor, (into[done:],), offset + done)
            if num == 0:
                failures[row] = f"{slots.name(row)}: the file ends before the sample does"
                return
            done += num

    def _damaged(self, slots: Slots, out_BR: npt.NDArray[np.uint8]) -> list[int]:
        if self._check == "seal":
            words_BW = out_BR.view(np.uint64)
            return np.flatnonzero(seals(words_BW[:, :-1]) != words_BW[:, -1]).tolist()
        if self._check == "crc32":
            checksums = enumerate(slots.checksums_B.tolist())
            return [row for row, known in checksums if known >= 0 and zlib.crc32(out_BR[row]) != known]
        return []
