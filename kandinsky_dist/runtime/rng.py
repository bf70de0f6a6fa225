"""Counter-based randomness on the device: noise and timesteps from (seed, stream, position, element).

The same values as `runtime.hashing` gives on the CPU, in plain torch integer operations, so that they do
not depend on device, rank, batch or the order in which samples are seen. No host sync.

Shapes: B samples, ... the shape of one sample.
"""

import math

import torch
from torch import Tensor

from kandinsky_dist.runtime.hashing import GOLDEN, MIX_1, MIX_2, Stream, stream_key


def _signed(word: int) -> int:
    """A 64-bit word as torch's int64, which wraps in the same way."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift would copy the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: Tensor) -> Tensor:
    """int64 twin of `hashing.mix`."""
    values = (values ^ _shift_right(values, 30)) * _signed(MIX_1)
    values = (values ^ _shift_right(values, 27)) * _signed(MIX_2)
    return values ^ _shift_right(values, 31)


def hash_counters(seed: int, stream: Stream, counters: Tensor) -> Tensor:
    """64 random bits a counter (int64, any shape)."""
    return mix(counters * _signed(GOLDEN) + _signed(stream_key(seed, stream)))


def uniform(seed: int, stream: Stream, positions_B: Tensor) -> Tensor:
    """One fp32 number in [0, 1) a position, with 24 random bits."""
    return _shift_right(hash_counters(seed, stream, positions_B), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, stream: Stream, positions_B: Tensor, high: int) -> Tensor:
    """One int64 in [0, high) a position; high up to 2^24."""
    return _shift_right(_shift_right(hash_counters(seed, stream, positions_B), 40) * high, 24)


def normal(seed: int, stream: Stream, positions_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32 noise, one independent tensor a position.

    Every 64-bit hash gives two uniforms of 32 bits and so, by Box-Muller, two normals.

    Args:
        positions_B: int64 sample positions.
        shape: shape of one sample's noise.

    Returns:
        (B, *shape) fp32 on the positions' device.

    Source: Box and Muller 1958.
    """
    num_elements = math.prod(shape)
    pairs = torch.arange(1, (num_elements + 1) // 2 + 1, device=positions_B.device, dtype=torch.int64)
    keys_B = hash_counters(seed, stream, positions_B)
    bits = mix(keys_B[:, None] + pairs * _signed(GOLDEN))
    radius = (-2.0 * ((_shift_right(bits, 32) + 1).to(torch.float32) * 2.0**-32).log()).sqrt()
    angle = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    flat = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num_elements]
    return flat.reshape(positions_B.shape[0], *shape)  # -1 would be ambiguous for an empty shape
