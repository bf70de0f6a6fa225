"""A deadline for steps in which a process may hang while a thread holds the interpreter's lock.

Neither a signal handler nor a thread of Python runs then. A timer of the C library calls `_exit` on a thread
of its own, which needs no lock, so that the process still ends with the exit code of what it has done.
"""

import contextlib
import ctypes
import faulthandler
from collections.abc import Callable, Iterator

LEAVE_SECONDS = 50.0
"""Time to leave the process groups; as much again for the interpreter's own end."""
STACK_SECONDS = 5.0
"""The stacks of all threads are printed this long before the process is ended."""

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of 64-bit Linux. Source: sigevent(7) and glibc's bits/types/sigevent_t.h."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _TimerTimes(ctypes.Structure):
    """`struct itimerspec` of 64-bit Linux: the period, then the first expiry. Source: timer_settime(2)."""

    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ("period_seconds", "period_nanoseconds", "first_seconds", "first_nanoseconds")
    )


@contextlib.contextmanager
def deadline(exit_code: int) -> Iterator[None]:
    """End the process with `exit_code` unless the context ends within LEAVE_SECONDS.

    The stacks of all threads are printed to stderr before.

    Args:
        exit_code: of the process, 0 to 255; where the C library has no such timer it is 1.
    """
    disarm = arm(exit_code)
    try:
        yield
    finally:
        disarm()


def arm(exit_code: int) -> Callable[[], None]:
    """Start the deadline of `deadline`, and return the function that calls it off."""
    calls_off = _end_later(exit_code)
    # Fails where stderr is no file.
    with contextlib.suppress(RuntimeError, ValueError, AttributeError, OSError):
        if calls_off is None:
            faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
        else:
            faulthandler.dump_traceback_later(max(LEAVE_SECONDS - STACK_SECONDS, LEAVE_SECONDS / 2))

    def disarm() -> None:
        faulthandler.cancel_dump_traceback_later()
        if calls_off is not None:
            calls_off()

    return disarm


def _end_later(exit_code: int) -> Callable[[], None] | None:
    """Start a timer that calls `_exit(exit_code)`; None where the C library has none."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "timer_create"):  # before glibc 2.34 it is in a library of its own
        return None
    function = ctypes.cast(library._exit, ctypes.c_void_p).value
    event = _SignalEvent(value=exit_code, notify=_SIGEV_THREAD, function=function)
    timer = ctypes.c_void_p()
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) != 0:
        return None
    seconds, fraction = divmod(LEAVE_SECONDS, 1.0)
    times = _TimerTimes(first_seconds=int(seconds), first_nanoseconds=int(fraction * 1e9))
    library.timer_settime(timer, 0, ctypes.byref(times), None)

    def calls_off() -> None:
        library.timer_delete(timer)

    return calls_off
