"""The weights that a run starts from, as fragments: what a run without a checkpoint goes back to."""

from functools import cached_property

import torch
from torch import Tensor

from kandinsky_dist.parallel.base import FRAGMENT_KINDS, ModelPlan


class InitialWeights:
    """A source of fragments whose moments are 0. It reads the weights when it is first asked for some."""

    def __init__(self, plan: ModelPlan) -> None:
        self._plan = plan

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened parameter, 1-D fp32 on the CPU."""
        if kind != FRAGMENT_KINDS[0]:
            return torch.zeros(stop - start)
        values = self._weights[name] if name in self._weights else self._built[name]
        return values.flatten()[start:stop].to(torch.float32)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return dict(self._plan.state_dict())

    @cached_property
    def _built(self) -> dict[str, Tensor]:
        """What has no initial weights elsewhere, such as adapters, is as the module is built with it."""
        return {name: item.detach() for name, item in self._plan.build().named_parameters()}
