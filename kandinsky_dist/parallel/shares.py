"""From each rank's share of every tensor to the whole tensors on all ranks."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""What `gather_shares` receives at a time, unless told otherwise."""


def gather_shares(
    wholes: Sequence[Tensor], group: dist.ProcessGroup | None = None, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Brings every rank's share of each tensor, cut as `owned_share` does, to all ranks of the group.

    Shares travel together, and large ones in pieces, so that neither the number of collectives grows with
    that of the tensors nor the memory with their size. Collective.

    Args:
        wholes: 1-D fp32, of the same lengths on all ranks; changed in place.
        group: all ranks where None.
        bucket_bytes: received at a time.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return
    for bucket in _share_buckets(wholes, world_size, max(1, bucket_bytes // (4 * world_size))):
        length = sum(stop - start for _, start, stop in bucket)
        sent, received = (bucket[0][0].new_zeros(size) for size in (length, world_size * length))
        mine, places = _pieces(bucket, sent, rank, world_size)
        torch._foreach_copy_(places, mine)
        dist.all_gather_into_tensor(received, sent, group=group)
        for other, values in enumerate(received.chunk(world_size)):
            if other != rank:
                theirs, places = _pieces(bucket, values, other, world_size)
                torch._foreach_copy_(theirs, places)


def _share_buckets(
    wholes: Iterable[Tensor], world_size: int, length: int
) -> Iterator[list[tuple[Tensor, int, int]]]:
    """(tensor, range inside each rank's share), `length` values of each rank at a time.

    Shares differ by one value at most; the ranges are those of the longest.
    """
    bucket: list[tuple[Tensor, int, int]] = []
    room = length
    for whole in wholes:
        share, start = -(-whole.numel() // world_size), 0
        while start < share:
            stop = min(share, start + room)
            bucket.append((whole, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield bucket
                bucket, room = [], length
    if bucket:
        yield bucket


def _pieces(
    bucket: Sequence[tuple[Tensor, int, int]], values: Tensor, rank: int, world_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """A rank's ranges of a bucket's tensors, and where they lie among its communicated values."""
    inside, among, offset = [], [], 0
    for whole, start, stop in bucket:
        first, end = (whole.numel() * edge // world_size for edge in (rank, rank + 1))
        piece = whole[first + start : min(first + stop, end)]
        inside.append(piece)
        among.append(values[offset : offset + piece.numel()])
        offset += stop - start
    return inside, among
