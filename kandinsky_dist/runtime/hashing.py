"""Counter-based randomness on the CPU: a pure function of (seed, stream, counter), in numpy.

Nothing that is drawn here has a state to save. `runtime.rng` computes the same values on a device.

Source: splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import enum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


class Stream(enum.IntEnum):
    """What a draw is for. Two streams are independent; a number, once given, is never reused."""

    CHUNK_ORDER = 1
    WINDOW_ORDER = 2
    CAPTION_DROPOUT = 3
    IMAGE_DROPOUT = 4
    TIMESTEP = 5
    NOISE = 6
    TURN_ORDER = 7
    BRANCH_SEED = 8
    REPLACEMENT = 9
    CAPTION_CHOICE = 10
    CAPTION_ENTRY = 11
    FLIP = 12
    CROP_DOWN = 13
    CROP_RIGHT = 14


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatters 64-bit integers: a bijection whose every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX_1)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX_2)
    return values ^ (values >> np.uint64(31))


@lru_cache(4096)  # asked for at every window of the plan: worked out anew, it was a third of finding places
def stream_key(seed: int, stream: Stream) -> int:
    """A 64-bit key for one use of one seed."""
    with np.errstate(over="ignore"):
        words = mix(np.array([seed & (2**64 - 1)], np.uint64) + np.uint64(GOLDEN))
        words = mix(words ^ (np.array([int(stream)], np.uint64) * np.uint64(GOLDEN)))
    return int(words[0])


def hash_counters(seed: int, stream: Stream, counters: Any) -> npt.NDArray[np.uint64]:
    """64 random bits a counter.

    Args:
        counters: non-negative integers of any shape, for instance sample positions.

    Returns:
        uint64 of the same shape.
    """
    with np.errstate(over="ignore"):
        words = np.asarray(counters).astype(np.uint64) * np.uint64(GOLDEN)
        return mix(words + np.uint64(stream_key(seed, stream)))


def uniform(seed: int, stream: Stream, counters: Any) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a counter, with 24 random bits (exact in fp32 too).

    Returns:
        float64 of the counters' shape.
    """
    return (hash_counters(seed, stream, counters) >> np.uint64(40)).astype(np.float64) * 2.0**-24
