"""Bytes of one shard for whoever walks over it: a local file by offset, a remote one front to back."""

import os
from types import TracebackType
from typing import Any, Protocol, Self

from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.patterns import shown
from kandinsky_dist.errors import DataError

WINDOW_BYTES = 8 * 1024
"""One read of a local file. It spans the end of a member, the next header and the head of what follows."""
SKIP_BYTES = 1 << 20


class DamagedShardError(DataError):
    """A shard that cannot be indexed because of what is in it: others are not concerned."""


class Reader(Protocol):
    """Bytes of one shard.

    Attributes:
        location: for messages.
        num_bytes: length of the shard.
        version: what changes when the shard is replaced, as a sidecar notes it.
        is_sequential: reads must not go back.
    """

    location: str
    num_bytes: int
    version: dict[str, str]
    is_sequential: bool

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; fewer than `size` only where the shard ends."""
        ...

    def close(self) -> None:
        """Lets go of the file or connection."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class _Closing:
    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalReader(_Closing):
    """A file by offset. Small reads that lie close together cost one read of the file."""

    is_sequential = False

    def __init__(self, path: str) -> None:
        """Opens the file.

        Raises:
            DamagedShardError: it cannot be opened.
        """
        self.location = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedShardError(f"{path}: {error.strerror or error}") from error
        if hasattr(os, "posix_fadvise"):
            # Else the system reads ahead between two members: nearly the whole shard.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        status = os.fstat(self._descriptor)
        self.num_bytes = status.st_size
        self.version = {"num_bytes": str(status.st_size), "mtime_ns": str(status.st_mtime_ns)}
        self._window, self._window_start = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; see `Reader.read`."""
        start = offset - self._window_start
        if start >= 0 and start + size <= len(self._window):
            return self._window[start : start + size]
        if size > WINDOW_BYTES:
            return self._pread(offset, size)
        self._window, self._window_start = self._pread(offset, WINDOW_BYTES), offset
        return self._window[:size]

    def _pread(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            try:
                part = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise DamagedShardError(
                    f"{self.location} cannot be read at byte {offset}: {error.strerror or error}"
                ) from error
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class StreamReader(_Closing):
    """A remote object, fetched once from its first byte to the last one that is asked for."""

    is_sequential = True

    def __init__(self, location: str) -> None:
        from kandinsky_dist.data.remote.fetch import open_stream

        self.location = shown(location)
        self._stream = open_stream(location)
        self.num_bytes = self._stream.num_bytes
        self.version = {"num_bytes": str(self._stream.num_bytes), "etag": self._stream.etag}
        self._position = 0

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset that is not before the last read's end; see `Reader.read`."""
        assert offset >= self._position
        while self._position < offset:
            if not self._take(min(SKIP_BYTES, offset - self._position)):
                return b""
        parts = []
        while size > 0 and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, size: int) -> bytes:
        part = self._stream.read(size)
        self._position += len(part)
        return part

    def close(self) -> None:
        """Ends the transfer."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


def open_reader(location: str) -> LocalReader | StreamReader:
    """Opens a shard.

    Raises:
        DamagedShardError: a local file that cannot be opened.
        DataError: a remote object that cannot be had.
    """
    return StreamReader(location) if is_remote(location) else LocalReader(location)
