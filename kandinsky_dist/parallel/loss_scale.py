"""The dynamic loss scale of fp16, on the device: nobody waits to learn whether a step overflowed."""

from collections.abc import Mapping

import torch
from torch import Tensor

INITIAL = 2.0**16
LEAST = 1.0
"""A scale below 1 would make small gradients vanish, which is what it is there against."""
GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale is doubled."""

SCALE, NUM_GOOD_STEPS = "loss_scale", "loss_scale_good_steps"
"""Names in a checkpoint, whichever engine scales."""


class LossScale:
    """What losses are multiplied with, so that small gradients do not vanish in fp16.

    Halved when a step's gradients are not finite, doubled after enough steps in a row whose are.

    Source: `torch.amp.GradScaler`, whose update this is; and a least value.
    """

    def __init__(self, device: torch.device, *, growth_steps: int = GROWTH_STEPS) -> None:
        self.value = torch.full((), INITIAL, dtype=torch.float32, device=device)
        self._num_good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._growth_steps = growth_steps

    def update(self, overflowed: Tensor) -> Tensor:
        """Prepares the next step. No host sync.

        Args:
            overflowed: 0-d fp32, 1 where the step's gradients are not finite; the same on every rank.

        Returns:
            0-d fp32, 1 where the scale was lowered.
        """
        rescaled = overflowed * (self.value > LEAST)
        torch._amp_update_scale_(self.value, self._num_good_steps, overflowed, 2.0, 0.5, self._growth_steps)
        self.value.clamp_(min=LEAST)
        return rescaled

    def state(self) -> dict[str, float]:
        """What a checkpoint remembers. Host sync."""
        return {SCALE: self.value.item(), NUM_GOOD_STEPS: self._num_good_steps.item()}

    def load(self, state: Mapping[str, float]) -> None:
        """Continues; from the beginning where the checkpoint knows no scale."""
        self.value.fill_(state.get(SCALE, INITIAL))
        self._num_good_steps.fill_(int(state.get(NUM_GOOD_STEPS, 0)) % self._growth_steps)
