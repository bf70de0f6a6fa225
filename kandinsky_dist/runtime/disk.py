"""Files that are there whole or not at all, and that outlive a power failure."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a small file so that a reader sees all of it or nothing; durable on return.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # the name that the reader of the message knows
        raise
    sync(path.parent)
