"""What the trainer asks of an objective: turn a batch into the model's inputs, and inputs into losses."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from kandinsky_dist.data.dataset import Batch


@dataclass(frozen=True)
class Prepared:
    """A micro-batch after the frozen encoders.

    Attributes:
        positions_B: int64; noise and timesteps are functions of them.
        clean: fp32 (B, ...), what is diffused.
        conditions: tensors of batch size B that the model is conditioned on.
    """

    positions_B: Tensor
    clean: Tensor
    conditions: dict[str, Tensor]


class Objective(Protocol):
    """A stage's loss."""

    def prepare(self, batch: Batch) -> Prepared:
        """Runs the frozen encoders. No gradient, no host sync."""

    def losses(self, model: nn.Module, prepared: Prepared) -> Tensor:
        """Each sample's loss, fp32 (B,). No host sync."""

    def evaluate(self, model: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """Each sample's validation figures by name, fp32 (B,); "loss" is among them."""


def roll_conditions(prepared: Prepared) -> Prepared:
    """Every sample with its neighbour's conditions: what a loss that ignores them would not notice."""
    rolled: dict[str, Any] = {name: value.roll(1, 0) for name, value in prepared.conditions.items()}
    return Prepared(prepared.positions_B, prepared.clean, rolled)
