"""What the C library does with memory that is freed: glibc's; of another one nothing is asked. No torch."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep what a CPU's tensors free for the next ones, as torch does on a GPU.

    glibc gives large pieces back to the kernel, which fills the pages of the next one with zeros, one fault a
    page.
    """
    _set(_MMAP_MAX, 0)
    _set(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Lets it give back each piece from 128 KiB on at once: what the system counts is then what is held."""
    _set(_MMAP_MAX, 2**16)
    _set(_MMAP_THRESHOLD, 2**17)
    _set(_TRIM_THRESHOLD, 2**17)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
