"""Errors meant for people: one line each, with the exit code the command ends with."""

import errno
import os

DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Numbers of the system's errors that say that a disk or a quota is full."""

_NO_MEMORY = "can't allocate memory"

_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


class KandinskyError(Exception):
    """An error with a remedy. Its text is one line: what was seen, the rule, what to do."""

    exit_code = 1


class ConfigError(KandinskyError):
    """A setting, path or combination that cannot work as given (exit 78)."""

    exit_code = 78


class DataError(KandinskyError):
    """Shards, captions or images that cannot be read as they should (exit 65)."""

    exit_code = 65


class SampleError(DataError):
    """One sample that is damaged or lacks a part, wherever and whenever it is read: training replaces it."""


class CheckpointError(KandinskyError):
    """A checkpoint or export that cannot be written, read or trusted (exit 1)."""


class DivergedError(KandinskyError):
    """Training has diverged, and going back has not helped (exit 1)."""


class FencedError(KandinskyError):
    """A newer start has taken over the run folder; not to be started again (exit 78)."""

    exit_code = 78


class OutOfMemoryError(KandinskyError):
    """A rank's memory is full (exit 1)."""


class DiskFullError(KandinskyError):
    """No space left for what a command makes, of which nothing was kept (exit 1)."""


class StoppedError(KandinskyError):
    """The run stopped on request after saving itself; the same command resumes it (exit 75)."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of torch on a CPU or of torch on a GPU says that memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == OutOfMemoryError.__name__:
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY in str(error)


def explained(error: BaseException) -> tuple[str, int] | None:
    """The line and exit code of an error that a person can act on, or None where only a traceback helps."""
    if isinstance(error, KandinskyError):
        return " ".join(str(error).splitlines()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", KandinskyError.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        if error.errno in DISK_FULL:
            reason += "; make room and give the same command again"
        if error.filename is not None:
            return f"{os.fsdecode(error.filename)}: {reason}", KandinskyError.exit_code
        if error.errno in DISK_FULL:
            return reason, KandinskyError.exit_code
        if error.errno in (errno.EPIPE, errno.EBADF):
            return f"standard output cannot be written: {reason}", KandinskyError.exit_code
    if is_out_of_memory(error):
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        return f"out of memory: {said}", OutOfMemoryError.exit_code
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_LOST):
        # From the collective that this rank was in; what the other one died of, it says itself.
        return (
            "another rank ended, and this one with it: that rank's own line says why",
            KandinskyError.exit_code,
        )
    return None
