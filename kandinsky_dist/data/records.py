"""Encoder outputs of samples, read straight into the rows of a batch.

A sample costs one read by the system and hardly anything else: where samples lie is worked out for thousands
at once, and no Python object is made for a sample. Threads of the process read ahead; worker processes would
spend ten times as long on handing batches over.

pread it is: a memory-mapped file is no faster where pages are touched for the first time, which is what an
epoch does (127-138k against 95-128k records of 35 KB a second, one core, page cache, Linux 6.18, which later
runs reversed), and an error of the disk would be a signal that ends the process.

Letters of shapes: B samples.
"""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kandinsky_dist.data.batch import BadSample
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order
from kandinsky_dist.data.record_layout import RecordLayout, Sheet
from kandinsky_dist.data.record_slots import MISSING, SlotFinder, Slots
from kandinsky_dist.errors import DataError

Int64s = npt.NDArray[np.int64]
Check = Literal["seal", "crc32", "none"]

RECORD_EXTENSION = "cached"
"""Of the members that hold records."""
CHECKED_AT_ONCE_BYTES = 2**20
"""So much has just been read and is still in a core's own cache, where seals are checked fastest."""
LOCATED_AT_ONCE = 4096
"""Positions. By batches of 256, finding the places would take a fifth of the time."""


@dataclass(frozen=True, eq=False)
class RecordBatch:
    """Records of some positions of the order.

    Attributes:
        tensors: each part of the records, (B, ...) on the CPU; rows (B, L, D) up to the longest record's,
            with zeros behind those of a shorter one.
        num_rows_B: rows of each record.
        bad_samples: what had to be replaced.
    """

    positions_B: Int64s
    tensors: Mapping[str, Tensor]
    num_rows_B: Int64s
    bad_samples: tuple[BadSample, ...]
    _slots: Slots = field(repr=False)

    def __len__(self) -> int:
        return len(self.positions_B)

    def keys(self) -> "Keys":
        """Key of each sample."""
        return Keys(self._slots)


class Keys(Sequence[str]):
    """Keys of a batch's samples, looked up only when somebody asks."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._slots.keys()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots.keys())


class RecordReader:
    """Reads the records at positions of an order.

    Args:
        order: of a local corpus.
        layouts: of the records, by aspect bucket as places have it.
        check: how damage is found. "seal": by the last 8 bytes of a record, which takes an eleventh of the
            time of "crc32", the sidecar's checksums; "none": only sizes are looked at.
    """

    def __init__(self, order: Order, layouts: Mapping[int, RecordLayout], *, check: Check = "seal") -> None:
        self._order = order
        self._layouts = layouts
        self._check = check
        self._finder = SlotFinder(order.manifest, RECORD_EXTENSION)

    def read(self, positions: npt.ArrayLike, *, pin_memory: bool = False) -> RecordBatch:
        """Reads the records at some positions, which are of one aspect bucket.

        A damaged sample is replaced by the order's next attempt.

        Args:
            positions: int64 (B,).
            pin_memory: into page-locked memory.

        Raises:
            DataError: a shard is gone or was replaced, or replacement after replacement is damaged.
        """
        positions_B = np.asarray(positions, np.int64)
        return self._read(positions_B, self._finder.find(self._order.locate(positions_B)), pin_memory)

    def num_rows(self, positions_B: Int64s) -> Int64s:
        """Rows of the records at some positions, by the sidecars alone; 0 of one that is no record."""
        places = self._order.locate(positions_B)
        layout = self._layouts[int(places.aspects_B[0])]
        return np.maximum(layout.num_rows(self._finder.find(places).sizes_B), 0)

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
        if num_threads == 0:
            yield from (self._read(*job, pin_memory) for job in self._located(lists))
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="records")
        pending: deque[Future[RecordBatch]] = deque()
        try:
            for job in self._located(lists):
                pending.append(pool.submit(self._read, *job, pin_memory))
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

    def _read(self, positions_B: Int64s, slots: Slots, pin_memory: bool) -> RecordBatch:
        sheet, failures = self._filled(slots, pin_memory)
        bad: list[BadSample] = []
        for row in sorted(failures):
            bad += self._replace(int(positions_B[row]), row, failures[row], slots, sheet)
        return RecordBatch(positions_B, sheet.tensors, sheet.num_rows_B, tuple(bad), slots)

    def _replace(self, position: int, row: int, failure: str, slots: Slots, sheet: Sheet) -> list[BadSample]:
        """Puts the order's next usable attempt into a row."""
        failures = [failure]
        for attempt in range(1, NUM_ATTEMPTS):
            other = self._finder.find(self._order.locate(np.array([position]), attempt))
            found, again = self._filled(other, False)
            if not again:
                sheet.put(row, found)
                slots.put(row, other)
                return [BadSample(position, reason, other.name(0)) for reason in failures]
            failures += again.values()
        raise DataError(
            f"{NUM_ATTEMPTS} samples in a row cannot be used, at position {position}, first {failures[0]}; "
            "kandinsky-dist data check says what is wrong with the corpus"
        )

    def _filled(self, slots: Slots, pin_memory: bool) -> tuple[Sheet, dict[int, str]]:
        """The records of some slots, and of those that cannot be used why."""
        layout = self._layouts[int(slots.aspects_B[0])]
        num_rows_B = layout.num_rows(slots.sizes_B)
        odd = np.flatnonzero(num_rows_B < 0).tolist()
        sheet = Sheet(layout, np.maximum(num_rows_B, 0), pin_memory=pin_memory)
        failures = {row: size_problem(slots.name(row), int(slots.sizes_B[row]), layout) for row in odd}
        buffers, descriptors = sheet.buffers(), slots.descriptors()
        offsets = np.maximum(slots.offsets_B, 0).tolist()  # of what is missing too, and then not used
        found, damaged = list[int](), list[int]()
        block = max(1, CHECKED_AT_ONCE_BYTES // layout.record_bytes(layout.max_rows))
        for start in range(0, len(slots), block):
            some = slice(start, start + block)
            try:
                found.extend(map(os.preadv, descriptors[some], buffers[some], offsets[some]))
            except OSError as error:
                raise _unreadable(slots, len(found), error) from error
            for row in (start + np.flatnonzero(found[some] != slots.sizes_B[some])).tolist():
                if row not in failures:
                    _read_again(slots, row, buffers[row], failures)
            if self._check == "seal":
                sheet.add_up(start, min(start + block, len(slots)))
        if self._check == "seal":
            damaged += sheet.broken_seals()
        if self._check == "crc32":
            known = zip(buffers, slots.checksums_B.tolist(), strict=True)
            damaged += [
                row
                for row, (pieces, checksum) in enumerate(known)
                if checksum >= 0 and _crc32(pieces) != checksum
            ]
        for row in damaged:
            failures.setdefault(row, seal_problem(slots.name(row)))
        return sheet, failures


def size_problem(sample: str, found: int, layout: RecordLayout) -> str:
    """Why a member of so many bytes cannot be a sample's record."""
    name = f"{sample}: .{RECORD_EXTENSION}"
    if found == MISSING:
        return f"{name} is missing; precompute the shard"
    if found == 0:
        return f"{name} is empty: the sample was damaged when the shards were precomputed"
    size = layout.record_bytes(layout.max_rows)
    return f"{name} has {found} bytes, a record has {'up to ' if layout.rows else ''}{size}: precompute again"


def seal_problem(sample: str) -> str:
    """What is said of a record whose seal is broken."""
    return f"{sample}: .{RECORD_EXTENSION} is not what was written: bytes changed"


def _read_again(slots: Slots, row: int, buffers: Iterable[Any], failures: dict[int, str]) -> None:
    """A read may give less than was asked for; only at the end of the file does it give nothing."""
    descriptor, offset = slots.shard(row).descriptor, int(slots.offsets_B[row])
    for buffer in buffers:
        while len(buffer):
            try:
                num = os.preadv(descriptor, (buffer,), offset)
            except OSError as error:
                raise _unreadable(slots, row, error) from error
            if num == 0:
                failures[row] = f"{slots.name(row)}: the file ends before the sample does"
                return
            buffer, offset = buffer[num:], offset + num


def _unreadable(slots: Slots, row: int, error: OSError) -> DataError:
    offset = int(slots.offsets_B[row])
    return DataError(f"{slots.shard(row).path}: cannot be read at byte {offset}: {error.strerror}")


def _crc32(buffers: Iterable[Any]) -> int:
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    return checksum
