"""Bytes of a sample, wherever its shard lies."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.shard_index import Places
from kandinsky_dist.data.tables import MAX_OPEN_SHARDS, Place, Tables
from kandinsky_dist.errors import DataError, SampleError

MAX_GAP_BYTES = 32 * 1024
"""Members that lie closer than this are fetched by one read: a second costs more than the bytes between."""


@dataclass(frozen=True)
class Sample:
    """One sample's key and the bytes of its members by extension."""

    key: str
    members: Mapping[str, bytes]


class Storage(Protocol):
    """Where shards are read from, by several threads at once, in forked and in spawned processes.

    Attributes:
        read_ahead_bytes: how much of the order `expect` should be told in advance; 0: nothing.
    """

    read_ahead_bytes: int

    def expect(self, places: Sequence[Place], extensions: Container[str] | None = None) -> None:
        """Says which samples will be read next, each once and about in this order, so as to fetch them."""
        ...

    def read(self, place: Place, extensions: Container[str] | None = None) -> Sample:
        """Reads a sample's members, those of the given extensions or all.

        Raises:
            SampleError: the bytes are not those that were indexed.
            DataError: the shard is gone, was replaced, or cannot be read.
        """
        ...


class LocalStorage:
    """Shards on a file system, read by offset.

    Reads carry their own offset (pread), so a descriptor that a forked worker inherits is safe to use.
    """

    read_ahead_bytes = 0

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._tables = Tables(manifest)
        self._files: OrderedDict[int, _TarFile] = OrderedDict()
        self._lock = Lock()

    def expect(self, places: Sequence[Place], extensions: Container[str] | None = None) -> None:
        """The system reads ahead by itself."""

    def read(self, place: Place, extensions: Container[str] | None = None) -> Sample:
        """Reads a sample; see `Storage.read`."""
        with self._lock:
            table = self._tables[place.shard]
            row = table.row(place)
            file = self._file(place.shard)
        key, places = table.index.keys_N[row], wanted(table.index.members(row), extensions)
        name = self._manifest.name(place.shard, key)
        members = file.read(places, name)
        check(members, table.index.checksums(row), name)
        return Sample(key, members)

    def _file(self, shard: int) -> "_TarFile":
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.popitem(last=False)  # closed when the last thread that reads it is done
            self._files[shard] = _TarFile(self._manifest.tar(shard), int(self._manifest.num_bytes_S[shard]))
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_manifest"])  # type: ignore[misc]


class _TarFile:
    """An open tar of the length that its manifest says."""

    def __init__(self, path: str, num_bytes: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._descriptor = -1
            raise DataError(
                f"{path}: {error.strerror}, though it is in the manifest; put the shard back"
            ) from error
        self._path = path
        found = os.fstat(self._descriptor).st_size
        if found != num_bytes:
            raise DataError(
                f"{path} has {found} bytes, its manifest says {num_bytes}: changed or cut short; "
                "copy it again, or index the shards again"
            )

    def read(self, places: Places, name: str) -> dict[str, bytes]:
        """Members at some places of one sample."""
        runs = {}
        for start, end in runs_of(places, MAX_GAP_BYTES):
            runs[start, end] = self._read(start, end - start, name)
        return {
            extension: next(
                data[offset - start : offset - start + size]
                for (start, end), data in runs.items()
                if start <= offset and offset + size <= end
            )
            for extension, (offset, size) in places.items()
        }

    def _read(self, offset: int, size: int, name: str) -> bytes:
        parts = []
        while size > 0:
            try:
                part = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise DataError(f"{self._path}: cannot be read at byte {offset}: {error.strerror}") from error
            if not part:
                raise SampleError(f"{name}: the file ends {size} bytes before the sample does")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def wanted(places: Places, extensions: Container[str] | None) -> Places:
    """The members that were asked for."""
    if extensions is None:
        return places
    return {extension: place for extension, place in places.items() if extension in extensions}


def runs_of(places: Places, max_gap_bytes: int) -> list[tuple[int, int]]:
    """Ranges (start, end) that cover some members; those that lie close together are in one."""
    runs: list[tuple[int, int]] = []
    for offset, size in sorted(places.values()):
        if runs and offset - runs[-1][1] <= max_gap_bytes:
            runs[-1] = (runs[-1][0], max(runs[-1][1], offset + size))
        else:
            runs.append((offset, offset + size))
    return runs


def check(members: Mapping[str, bytes], checksums: Mapping[str, int], name: str) -> None:
    """Compares members with the CRC-32 that indexing found.

    Raises:
        SampleError: they differ.
    """
    for extension, data in members.items():
        if extension in checksums and zlib.crc32(data) != checksums[extension]:
            raise SampleError(f"{name}: .{extension} is not what was indexed (CRC-32 differs): bytes changed")
