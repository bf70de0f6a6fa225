"""Copies of what a rank saves, in CPU memory, so that training may change the originals."""

import platform
from collections.abc import Mapping

import torch
from torch import Tensor

from kandinsky_dist.checkpoint.layout import RankTensors
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.memory import free_bytes

_BLOCK_VALUES = 2**26
"""Values of one allocation, 256 MiB: torch rounds pinned memory up to a power of two, each time."""
_FREE_SHARE = 0.9
"""Of a machine's free memory that copies may take: training and its loaders breathe."""


class Staging:
    """Memory for one copy, kept from one save to the next; pinned where the originals are on a GPU."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._has_room = False

    def lack_of_room(self, live: RankTensors) -> str | None:
        """Why the copies of all ranks do not fit into their machines' memory, or None if they do.

        Once they do, that is not asked again, as the memory stays. Collective: call on every rank.
        """
        if self._has_room:
            return None
        mine = 4 * sum(tensor.numel() for tensor in live.tensors.values())
        found = agree.gather((platform.node(), mine, free_bytes()))
        for host in sorted({name for name, _, _ in found}):
            needed = sum(size for name, size, _ in found if name == host)
            free = min(left for name, _, left in found if name == host)
            if needed > _FREE_SHARE * free:
                return (
                    f"{needed / 2**30:.1f} GiB of {host}'s memory, of which {free / 2**30:.1f} GiB are free"
                )
        self._has_room = True
        return None

    def take(self, live: RankTensors) -> RankTensors:
        """Copies all tensors as fp32; overwrites what the last call has returned.

        From a GPU the copies are only queued, on the current stream: what is computed there next may change
        the originals, but `wait` comes before the copies are read.
        """
        sizes = {name: tensor.numel() for name, tensor in live.tensors.items()}
        if sizes != {name: tensor.numel() for name, tensor in self._memory.items()}:
            self._memory = {}  # freed before the new memory is asked for
            on_gpu = any(tensor.is_cuda for tensor in live.tensors.values())
            self._memory = _allocate(sizes, is_pinned=on_gpu)
        for name, tensor in live.tensors.items():
            self._memory[name].copy_(tensor, non_blocking=True)
        self._copied = None
        if any(tensor.is_cuda for tensor in live.tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return RankTensors(dict(self._memory), live.numels)

    def wait(self) -> None:
        """Waits until what `take` has queued is there. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()


def _allocate(sizes: Mapping[str, int], *, is_pinned: bool) -> dict[str, Tensor]:
    """Flat fp32 tensors that lie in as few allocations as their block size allows."""
    found: dict[str, Tensor] = {}
    block, used, left = torch.empty(0), 0, sum(sizes.values())
    for name, size in sizes.items():
        if used + size > block.numel():
            num_values = max(size, min(left, _BLOCK_VALUES))
            block, used = torch.empty(num_values, dtype=torch.float32, pin_memory=is_pinned), 0
        found[name] = block[used : used + size]
        used, left = used + size, left - size
    return found
