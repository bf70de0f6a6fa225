"""Who works on what, among processes that see one folder: a lock on a file, which dies with its owner.

Only time depends on it. Where a file system does not lock across machines, two of them may do a piece of work
at once; both then make the same files under names of their own, and rename them.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the work that a file stands for is this process's for the length of the block.

    It is not if another process is at it, or was done with it a moment ago. Nobody waits. The file names the
    owner, for people, and is gone afterwards; that of a process that was killed is taken over.
    """
    descriptor = _opened(path)
    try:
        if not _is_locked(descriptor) or not _is_at(path, descriptor):
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner()}\n".encode(), 0)
        try:
            yield True
        finally:
            if _is_at(path, descriptor):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def owner() -> str:
    """This process among all of a cluster."""
    return f"{socket.gethostname()}.{os.getpid()}"


def _opened(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed in between, by whoever finished


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a name still stands for an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
