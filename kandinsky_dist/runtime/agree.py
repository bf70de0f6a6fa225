"""Small facts that all ranks must share, over CPU tensors so that no GPU is synchronised."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kandinsky_dist.errors import KandinskyError

Result = TypeVar("Result")


def decided_by_first(decide: Callable[[], Result]) -> Result:
    """What rank 0 decides, on every rank; an error meant for people is raised on every rank.

    Collective: call on every rank.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [decide()]
        except KandinskyError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if isinstance(box[0], KandinskyError):
        raise box[0]
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. Collective: call on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_error(error: Exception | None) -> tuple[int, str, str] | None:
    """The lowest failing rank's (rank, type, message), on every rank. Collective: call on every rank."""
    found = gather(None if error is None else (type(error).__name__, str(error)))
    return next(((rank, *item) for rank, item in enumerate(found) if item is not None), None)


class LaggedFlag:
    """Whether any rank raised its flag, known to all at the same step, one step late.

    The all-reduce of step n runs beside the computation of step n + 1, so nobody waits for it.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self, raised: bool) -> bool:
        """Hands in this rank's flag and returns what the ranks handed in at the previous call.

        Collective: call on every rank, once a step.
        """
        previous, self._pending = self._pending, None
        flag = torch.tensor([int(raised)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if work is not None:
            self._pending = (work, flag)
        if previous is None:
            return False
        previous[0].wait()
        return bool(previous[1].item())
