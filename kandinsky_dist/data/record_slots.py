"""Where records lie, worked out for many samples at once.

Letters of shapes: B samples, N samples of a shard.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.order import Places
from kandinsky_dist.data.tables import Place, Table, Tables
from kandinsky_dist.errors import DataError

Int64s = npt.NDArray[np.int64]

MAX_OPEN_SHARDS = 320
"""A rank alone reads on 64 lanes, in windows of 4 chunks that may lie in as many shards. Each costs two
descriptors, as a mapped sidecar keeps its own; 1024 is the usual limit of a process."""
MISSING = -1
"""In place of a size or an offset: the sample has no such member."""


class OpenShard:
    """An open tar, and where its records lie.

    Attributes:
        name: how messages call it.
        descriptor: of the file, closed with the last reference to this.
        offsets_N, sizes_N: of the records in bytes, MISSING where there is none.
        checksums_N: their CRC-32, -1 where unknown.
    """

    def __init__(self, manifest: Manifest, shard: int, table: Table, extension: str) -> None:
        self.descriptor = -1
        self.name = manifest.tars[shard]
        self.path = manifest.tar(shard)
        self.keys_N = table.index.keys_N
        self._shard = shard
        self._table = table
        self._selected = manifest.selected(shard)
        if extension in table.index.extensions:
            column = table.index.extensions.index(extension)
            self.offsets_N = table.index.offsets_NE[:, column]
            self.sizes_N = np.where(self.offsets_N >= 0, table.index.sizes_NE[:, column], MISSING)
            self.checksums_N = table.index.checksums_NE[:, column]
        else:
            self.offsets_N = self.sizes_N = self.checksums_N = np.full(len(table.index), MISSING)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{self.path}: {error.strerror}, though it is in the manifest; put the shard back"
            ) from error
        found, expected = os.fstat(self.descriptor).st_size, int(manifest.num_bytes_S[shard])
        if found != expected:
            raise DataError(
                f"{self.path} has {found} bytes, its manifest says {expected}: changed or cut short; "
                "copy it again, or index the shards again"
            )

    def rows(self, indices_B: Int64s, aspects_B: npt.NDArray[np.int8]) -> Int64s:
        """Rows of the sidecar for samples of this shard."""
        if (aspects_B == WHOLE).all():
            return indices_B if self._selected is None else self._selected[indices_B].astype(np.int64)
        places = zip(indices_B.tolist(), aspects_B.tolist(), strict=True)
        return np.array([self._table.row(Place(self._shard, *place)) for place in places], np.int64)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(eq=False)
class Slots:
    """Where some samples' records lie. Keeps their shards open.

    Attributes:
        shards: by number; may have more than these samples need.
        aspects_B: buckets by which they were asked for; see `tables.Place`.
        rows_B: of the sidecars.
        offsets_B, sizes_B: in bytes, MISSING where a sample has no such member.
        checksums_B: CRC-32, -1 where unknown.
    """

    shards: dict[int, OpenShard]
    shards_B: npt.NDArray[np.int32]
    aspects_B: npt.NDArray[np.int8]
    rows_B: Int64s
    offsets_B: Int64s
    sizes_B: Int64s
    checksums_B: Int64s

    def __len__(self) -> int:
        return len(self.rows_B)

    def part(self, start: int, end: int) -> "Slots":
        """Those of one batch."""
        cut = slice(start, end)
        return Slots(
            self.shards,
            self.shards_B[cut],
            self.aspects_B[cut],
            self.rows_B[cut],
            self.offsets_B[cut],
            self.sizes_B[cut],
            self.checksums_B[cut],
        )

    def put(self, row: int, other: "Slots") -> None:
        """Takes another sample for a row: the first of `other`."""
        self.shards = {**self.shards, **other.shards}
        self.shards_B[row], self.rows_B[row] = other.shards_B[0], other.rows_B[0]

    def shard(self, row: int) -> OpenShard:
        """What a row is read from."""
        return self.shards[int(self.shards_B[row])]

    def descriptors(self) -> list[int]:
        """The open file of each row."""
        by_number = {number: shard.descriptor for number, shard in self.shards.items()}
        return [by_number[number] for number in self.shards_B.tolist()]

    def keys(self) -> list[str]:
        """Key of each row's sample."""
        return [self.shard(row).keys_N[int(self.rows_B[row])] for row in range(len(self))]

    def name(self, row: int) -> str:
        """How messages call a row's sample."""
        return f"{self.shard(row).name}:{self.shard(row).keys_N[int(self.rows_B[row])]}"


class SlotFinder:
    """The open shards of a local corpus, those last used kept open. For several threads."""

    def __init__(self, manifest: Manifest, extension: str) -> None:
        self._manifest = manifest
        self._extension = extension
        self._tables = Tables(manifest)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def find(self, places: Places) -> Slots:
        """Where the records of some places lie.

        Raises:
            DataError: a shard or its sidecar is gone or is not that of the manifest.
        """
        num = len(places.shards_B)
        rows_B, offsets_B, sizes_B, checksums_B = np.empty((4, num), np.int64)
        slots = Slots({}, places.shards_B, places.aspects_B, rows_B, offsets_B, sizes_B, checksums_B)
        by_shard = np.argsort(places.shards_B, kind="stable")
        starts = np.flatnonzero(np.diff(places.shards_B[by_shard], prepend=-1))
        for members in np.split(by_shard, starts[1:]) if num else ():
            number = int(places.shards_B[members[0]])
            with self._lock:
                shard = slots.shards[number] = self._shard(number)
                rows = shard.rows(places.indices_B[members], places.aspects_B[members])
            rows_B[members] = rows
            offsets_B[members] = shard.offsets_N[rows]
            sizes_B[members] = shard.sizes_N[rows]
            checksums_B[members] = shard.checksums_N[rows]
        return slots

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)  # closed when the last batch that reads it is done
            self._open[number] = OpenShard(self._manifest, number, self._tables[number], self._extension)
        self._open.move_to_end(number)
        return self._open[number]
