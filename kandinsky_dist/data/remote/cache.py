"""Blocks of remote objects on a local disk, fetched once for all processes of a machine.

A block's file is its content, a CRC-32 of every page of it, and a footer that says how long it is. It comes
into being under another name and is renamed, so it is whole or not there, whoever is killed when.
"""

import fcntl
import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from kandinsky_dist.errors import explained

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 * 2**20
PAGE_BYTES = 256 * 1024
"""What is checked at once: a sample of 100 KB does not cost a look at its whole block."""
_FOOTER = struct.Struct("<Q8s")
_MAGIC = b"kdblock1"
_UNFINISHED = ".part"
_LOW_WATER = 0.9
"""Share of the bound that eviction leaves, so that it is not needed again for the next block."""


class BlockCache:
    """Read-through cache of blocks, shared by processes and threads. Never an error: at worst no cache.

    Blocks that were used least recently go first.

    Args:
        folder: made if it is missing; on a disk of this machine, for locks are taken there.
        max_bytes: of all that is kept; besides, each thread that fetches has a block in the making.
        block_bytes: of a block; the last one of an object may be shorter.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.block_bytes = block_bytes
        self._is_broken = False

    def get(
        self,
        location: str,
        version: str,
        block: int,
        fetch: Callable[[], bytes],
        start: int = 0,
        end: int | None = None,
    ) -> bytes:
        """Bytes [start, end) of a block, to its end if None.

        One process fetches, the others wait for it.

        Args:
            location: of the object.
            version: another one if the object may have changed.
            block: number of the block; its size is part of its name.
            fetch: gets the whole block; what it raises is passed on, and whoever waited tries for himself.
            start: first byte inside the block.
            end: byte behind the last.
        """
        if self._is_broken:
            return fetch()[start:end]
        name = hashlib.sha256(f"{location}\n{version}\n{self.block_bytes}\n{block}".encode()).hexdigest()
        path = self.folder / name[:2] / name
        whole: bytes | None = None
        is_fetching = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                if (data := _load(path, start, end)) is not None:
                    return data
                with _locked(path.with_name(name + _UNFINISHED)) as descriptor:
                    if descriptor is None:
                        continue  # whoever had it is done
                    # Between the look above and the lock, somebody may have been faster.
                    if (data := _load(path, start, end)) is not None:
                        return data
                    is_fetching = True
                    whole = fetch()
                    is_fetching = False
                    self._store(path, descriptor, whole)
                    return whole[start:end]
        except OSError as error:
            if is_fetching:
                raise
            self._give_up(error)
            return (fetch() if whole is None else whole)[start:end]

    def _store(self, path: Path, descriptor: int, data: bytes) -> None:
        """Writes a block's file; the caller holds the lock of its unfinished one."""
        crcs = [zlib.crc32(data[page : page + PAGE_BYTES]) for page in range(0, len(data), PAGE_BYTES)]
        tail = np.array(crcs, "<u4").tobytes() + _FOOTER.pack(len(data), _MAGIC)
        num_bytes = len(data) + len(tail)
        if num_bytes > self.max_bytes:
            return
        os.ftruncate(descriptor, 0)
        for part in (data, tail):
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view) :]
        with _exclusive(self.folder / "num_bytes") as counter:
            # When the count says that it is full, the truth is looked up.
            counted = os.pread(counter, 32, 0)
            total = int(counted) if counted.isdigit() else self.max_bytes
            if total + num_bytes > self.max_bytes:
                total = self._evict(num_bytes)
            os.pwrite(counter, str(total + num_bytes).zfill(20).encode(), 0)
            os.rename(path.with_name(path.name + _UNFINISHED), path)

    def _evict(self, num_bytes: int) -> int:
        """Removes files, the least recently used first, until there is room; bytes that are left."""
        files = []
        for path in self.folder.glob("??/*"):
            if path.name.endswith(_UNFINISHED):
                _remove_abandoned(path)
                continue
            with suppress(FileNotFoundError):
                about = path.stat()
                files.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in files)
        bound = min(int(self.max_bytes * _LOW_WATER), self.max_bytes - num_bytes)
        for _, size, path in sorted(files):
            if total <= bound:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _give_up(self, error: OSError) -> None:
        if not self._is_broken:
            self._is_broken = True
            reason = explained(error)
            log.warning(
                "cache in %s is not used any more: %s; data is fetched without it",
                self.folder,
                reason[0] if reason else error,
            )

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "max_bytes": self.max_bytes, "block_bytes": self.block_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _load(path: Path, start: int, end: int | None) -> bytes | None:
    """Part of a block; None if there is no such block or its bytes are not what was written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        footer = os.pread(descriptor, _FOOTER.size, max(0, size - _FOOTER.size))
        if len(footer) != _FOOTER.size:
            return None
        length, magic = _FOOTER.unpack(footer)
        num_pages = -(-length // PAGE_BYTES)
        if magic != _MAGIC or size != length + 4 * num_pages + _FOOTER.size:
            return None
        start, end, _ = slice(start, end).indices(length)
        first, last = start // PAGE_BYTES, -(-end // PAGE_BYTES)
        pages = _read(descriptor, first * PAGE_BYTES, min(length, last * PAGE_BYTES))
        crcs = np.frombuffer(_read(descriptor, length + 4 * first, length + 4 * last), "<u4").tolist()
        view = memoryview(pages)
        if [zlib.crc32(view[page : page + PAGE_BYTES]) for page in range(0, len(view), PAGE_BYTES)] != crcs:
            return None
        os.utime(descriptor)  # for eviction; disks do not note when a file was read
        return pages[start - first * PAGE_BYTES : end - first * PAGE_BYTES]
    finally:
        os.close(descriptor)


def _read(descriptor: int, start: int, end: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(descriptor, end - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """The descriptor of a file that only one thread of all processes has at a time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The descriptor of an unfinished file; None if it was finished or given up while one waited.

    The file is gone afterwards, unless it was renamed.
    """
    with _exclusive(path) as descriptor:
        if not _is_at(path, descriptor):
            yield None
            return
        try:
            yield descriptor
        finally:
            if _is_at(path, descriptor):
                path.unlink()


def _remove_abandoned(path: Path) -> None:
    """Removes the unfinished file of a process that is no more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        pass  # at work
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a name still stands for an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
