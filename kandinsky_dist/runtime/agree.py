"""Small facts that all ranks must share, over CPU tensors so that no GPU is synchronised."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kandinsky_dist.errors import KandinskyError

Result = TypeVar("Result")


def decided_by_first(decide: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What rank 0 decides, on every rank; an error meant for people is raised on every rank.

    Collective: call on every rank.

    Args:
        decide: called on rank 0.
        group: see `gather`.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [decide()]
        except KandinskyError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    if isinstance(box[0], KandinskyError):
        raise box[0]
    return box[0]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, on every rank. Collective: call on every rank.

    Args:
        value: this rank's; it travels by pickle between our own processes.
        group: of all ranks, over gloo; None is the one that the main thread uses. A second thread needs its
            own, or its question would meet another one's answer.
    """
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_error(
    error: Exception | None, group: dist.ProcessGroup | None = None
) -> tuple[int, str, str] | None:
    """The lowest failing rank's (rank, type, message), on every rank. Collective: call on every rank."""
    found = gather(None if error is None else (type(error).__name__, str(error)), group)
    return next(((rank, *item) for rank, item in enumerate(found) if item is not None), None)
