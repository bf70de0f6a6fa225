"""Bytes of a sample, wherever its shard lies."""

import os
from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.shard_index import ShardIndex, read_shard_index
from kandinsky_dist.errors import DataError

MAX_OPEN_SHARDS = 128
MAX_GAP_BYTES = 32 * 1024
"""Members that lie closer than this are fetched by one read: a second costs more than the bytes between."""


@dataclass(frozen=True)
class Sample:
    """One sample's key and the bytes of its members by extension."""

    key: str
    members: Mapping[str, bytes]


class Storage(Protocol):
    """Where shards are read from. Implementations can be used in forked and in spawned worker processes."""

    def read(self, shard: int, index: int, extensions: Container[str] | None = None) -> Sample:
        """Reads a sample's members, those of the given extensions or all.

        Raises:
            DataError: the bytes cannot be had, naming shard and key.
        """
        ...


class LocalStorage:
    """Shards on a file system, read by offset.

    Reads carry their own offset (pread), so a descriptor that a forked worker inherits is safe to use.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, shard: int, index: int, extensions: Container[str] | None = None) -> Sample:
        """Reads a sample; see `Storage.read`."""
        source = self._shard(shard)
        key = source.index.key(index)
        places = {
            extension: place
            for extension, place in source.index.members(index).items()
            if extensions is None or extension in extensions
        }
        try:
            return Sample(key, source.read(places))
        except (OSError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"{source.path}: cannot read sample {key!r}: {reason}; copy the shard again"
            ) from error

    def _shard(self, shard: int) -> "_OpenShard":
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = _OpenShard(self._manifest, shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_manifest"])  # type: ignore[misc]


class _OpenShard:
    """A shard's descriptor and sidecar."""

    def __init__(self, manifest: Manifest, shard: int) -> None:
        self.path: Path = manifest.shard_path(shard)
        self.index: ShardIndex = read_shard_index(self.path)
        expected = manifest.shards[shard].fingerprint
        if self.index.metadata["fingerprint"] != expected:
            raise DataError(
                f"{self.path}: its index is of another version of the shard than the manifest; "
                f"run: kandinsky-dist data index {self.path.parent}"
            )
        self._descriptor: int | None = None

    def read(self, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
        if not places:
            return {}
        start = min(offset for offset, _ in places.values())
        end = max(offset + size for offset, size in places.values())
        if end - start - sum(size for _, size in places.values()) <= MAX_GAP_BYTES:
            run = self._read(start, end - start)
            return {
                name: run[offset - start : offset - start + size] for name, (offset, size) in places.items()
            }
        return {name: self._read(offset, size) for name, (offset, size) in places.items()}

    def _read(self, offset: int, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        parts = []
        while size > 0:
            part = os.pread(self._descriptor, size, offset)
            if not part:
                raise EOFError(f"the file ends {size} bytes before the sample does")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
