"""What the trainer asks of an objective: turn a batch into the model's inputs, and inputs into losses."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream

NUM_HELD_OUT_DRAWS = 4


@dataclass(frozen=True)
class Prepared:
    """A micro-batch after the frozen encoders.

    Attributes:
        positions_B: int64; noise and timesteps are functions of them.
        clean: fp32 (B, ...), what is diffused.
        conditions: tensors of batch size B that the model is conditioned on.
        num_text_tokens: text tokens of all samples that the model is to compute; None: all, padding included.
    """

    positions_B: Tensor
    clean: Tensor
    conditions: dict[str, Tensor]
    num_text_tokens: int | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that it has."""
        return [self.positions_B, self.clean, *self.conditions.values()]


@dataclass(frozen=True)
class Draw:
    """Which of `count` draws of noise and timestep a sample gets; training has one, unless it asks for more.

    A sample's draws have independent noise, and timesteps spread evenly over the diffusion from a place that
    is uniform: each by itself is distributed like a single draw, so their mean estimates the same without
    bias, and varies less than with independent timesteps where the loss depends on the timestep. A held-out
    loss over a few hundred samples would otherwise depend more on their timesteps than on the model.
    """

    number: int = 0
    count: int = 1

    def split(self, count: int) -> list["Draw"]:
        """So many draws in place of this one, spread over its part of the diffusion."""
        return [Draw(self.number * count + number, self.count * count) for number in range(count)]

    def timesteps(self, seed: int, positions_B: Tensor, num_timesteps: int) -> Tensor:
        """int64 (B,) in [0, num_timesteps)."""
        first_B = rng.integers(seed, Stream.TIMESTEP, positions_B, num_timesteps)
        return (first_B + num_timesteps * self.number // self.count) % num_timesteps

    def noise(self, seed: int, positions_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal fp32 (B, *shape)."""
        return rng.normal(seed, Stream.NOISE, positions_B + (self.number << 48), shape)


TRAINING_DRAW = Draw()


class Objective(Protocol):
    """A stage's loss."""

    def prepare(self, batch: Batch) -> Prepared:
        """Runs the frozen encoders. No gradient, no host sync."""

    def losses(self, model: nn.Module, prepared: Prepared, *, draw: Draw = TRAINING_DRAW) -> Tensor:
        """Each sample's loss, fp32 (B,). No host sync."""

    def evaluate(self, model: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """Each sample's validation figures by name, fp32 (B,); "loss" is among them."""


def mean_losses(objective: Objective, model: nn.Module, prepared: Prepared) -> Tensor:
    """Each sample's loss, fp32 (B,), averaged over the held-out draws."""
    draws = [Draw(number, NUM_HELD_OUT_DRAWS) for number in range(NUM_HELD_OUT_DRAWS)]
    return torch.stack([objective.losses(model, prepared, draw=draw) for draw in draws]).mean(0)


def roll_conditions(prepared: Prepared) -> Prepared:
    """Every sample with its neighbour's conditions: what a loss that ignores them would not notice."""
    rolled: dict[str, Any] = {name: value.roll(1, 0) for name, value in prepared.conditions.items()}
    return replace(prepared, conditions=rolled)
