"""The collectives that training uses, on messages of any size, and what counts as their bandwidth."""

import torch
import torch.distributed as dist

from kandinsky_dist.runtime.process import Process

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# torch 2.13 renamed them and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """Buffers for messages of up to `largest_bytes`, and calls on parts of them."""

    def __init__(self, process: Process, largest_bytes: int) -> None:
        self._world_size = process.world_size
        self._whole, self._other = (
            torch.zeros(largest_bytes, dtype=torch.uint8, device=process.device) for _ in range(2)
        )

    def call(self, collective: str, dtype: str, num_bytes: int) -> None:
        """One collective on a message of about `num_bytes`, the whole of it on every rank or on all together.

        As in nccl-tests the size is that of the longer side: what a rank puts in (all-reduce,
        reduce-scatter) or gets out (all-gather). It is cut to a multiple of the number of ranks.
        """
        whole, other = (item[:num_bytes].view(DTYPES[dtype]) for item in (self._whole, self._other))
        share = whole.numel() // self._world_size
        whole, part = whole[: share * self._world_size], other[:share]
        if collective == "all-reduce":
            dist.all_reduce(whole)
        elif collective == "reduce-scatter":
            _reduce_scatter(part, whole)
        else:
            _all_gather(whole, part)


COLLECTIVES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
"""Collective -> times that every byte crosses a rank's link, but for its own share of 1/N."""


def bus_factor(collective: str, world_size: int) -> float:
    """Bus bandwidth over algorithm bandwidth: bytes that cross a rank's link for a byte of the message.

    Whatever the algorithm, a rank must receive the other ranks' (N - 1)/N of the result, and for an
    all-reduce its share of all others' contributions too: 2 (N - 1)/N.
    """
    return COLLECTIVES[collective] * (world_size - 1) / world_size
