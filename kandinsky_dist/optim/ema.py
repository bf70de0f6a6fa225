"""Exponential moving averages of the weights, over the slices of them that a rank owns."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_KIND_PREFIX = "ema_"
_GROUP_VALUES = 2**24
"""Differences are held for so many values at a time: 64 MiB, however large the model is."""

Group = tuple[list[Tensor], list[Tensor]]


def kind_of(decay: float) -> str:
    """The name that checkpoints know an average by, such as "ema_0.9999"."""
    return f"{_KIND_PREFIX}{decay}"


def decays_among(kinds: Iterable[str]) -> list[float]:
    """The decays of the averages among a checkpoint's kinds, rising."""
    return sorted(float(kind.removeprefix(_KIND_PREFIX)) for kind in kinds if kind.startswith(_KIND_PREFIX))


class Ema:
    """Averages with several decays of tensors that an optimizer changes in place.

    At an average's update t, counted from 0,

        average -= (1 - d) * (average - value),   d = 0 for t = 0, else min(decay, (1 + t) / (10 + t)).

    Subtraction and product are rounded one by one, so that an average does not depend on how the weights are
    cut into tensors, as that of a fused multiply-add in vectorised loops would.

    Source: `diffusers.training_utils.EMAModel`, with its default warm-up.

    Args:
        decays: each in (0, 1), all different; none makes an object that does nothing.
        masters: fp32, 1-D; live, the averages start equal to them.
        device: where the outcome of a step is known, and so the number of updates.
    """

    def __init__(self, decays: Sequence[float], masters: Sequence[Tensor], device: torch.device) -> None:
        self.decays = tuple(decays)
        self._masters = list(masters)
        self._averages = {decay: [master.clone() for master in masters] for decay in decays}
        self._groups = {decay: list(_groups(held, self._masters)) for decay, held in self._averages.items()}
        self._limits = torch.tensor(self.decays, dtype=torch.float64, device=device)
        self._num_updates = torch.zeros_like(self._limits)  # whole numbers

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Takes in the masters after an optimizer step. No host sync.

        Args:
            skipped: 0-d; 1 where the step was skipped: averages and number of updates then stay as they are.
        """
        if not self.decays:
            return
        is_taken = 1.0 - skipped.to(torch.float64)
        warm_up = (1.0 + self._num_updates) / (10.0 + self._num_updates) * (self._num_updates > 0)
        weights = ((1.0 - torch.minimum(self._limits, warm_up)) * is_taken).to(torch.float32)
        self._num_updates += is_taken
        for groups, weight in zip(self._groups.values(), weights.unbind(), strict=True):
            for averages, masters in groups:
                differences = torch._foreach_sub(averages, masters)
                torch._foreach_mul_(differences, weight.to(averages[0].device))
                torch._foreach_sub_(averages, differences)

    @contextmanager
    def in_place_of_masters(self, decay: float, publish: Callable[[], None]) -> Iterator[None]:
        """Lets the masters have the average's values inside the context, and their own again after it.

        A copy of one tensor at a time is made, not of all.

        Args:
            decay: of the average.
            publish: makes what else is derived from the masters follow them; not called again where the
                context ends with an error, for other ranks may not be there to take part.
        """
        self._exchange(decay)
        try:
            publish()
            yield
        finally:
            self._exchange(decay)
        publish()

    @torch.no_grad()
    def _exchange(self, decay: float) -> None:
        for average, master in zip(self._averages[decay], self._masters, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Kind -> the live average of each master, in their order."""
        return {kind_of(decay): list(held) for decay, held in self._averages.items()}

    def num_updates(self) -> dict[str, int]:
        """Kind -> how many steps are in the average. Host sync."""
        counts = map(int, self._num_updates.tolist())
        return {kind_of(decay): count for decay, count in zip(self.decays, counts, strict=True)}

    def load(self, decay: float, values: Iterable[Tensor], num_updates: int) -> None:
        """Continues an average.

        Args:
            decay: of the average.
            values: one tensor for each master, in their order.
            num_updates: steps that are in it.
        """
        for average, value in zip(self._averages[decay], values, strict=True):
            average.copy_(value)
        self._num_updates[self.decays.index(decay)] = num_updates


def _groups(averages: Sequence[Tensor], masters: Sequence[Tensor]) -> Iterator[Group]:
    """Views of both, cut and put together so that a group is at most `_GROUP_VALUES` values."""
    group: Group = ([], [])
    num_values = 0
    for average, master in zip(averages, masters, strict=True):
        for piece in zip(average.split(_GROUP_VALUES), master.split(_GROUP_VALUES), strict=True):
            if num_values + piece[0].numel() > _GROUP_VALUES:
                yield group
                group, num_values = ([], []), 0
            for tensors, tensor in zip(group, piece, strict=True):
                tensors.append(tensor)
            num_values += piece[0].numel()
    if num_values:
        yield group
