"""What a step costs, counted without computing it: the work that is done, and no other."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import Config, ParallelConfig
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.cache_description import CacheDescription
from kandinsky_dist.data.cached import blank_batch
from kandinsky_dist.models.frozen import clip_preprocessing
from kandinsky_dist.objectives.base import Objective, Prepared
from kandinsky_dist.objectives.prior import PriorObjective
from kandinsky_dist.telemetry.flops import count_flops, without_memory
from kandinsky_dist.train.build import Folders, model_plan

LENGTHS = (2, 3, 4)
"""Text lengths at which a sample is counted: products are linear in the length, attention is quadratic."""

NumComputed = Callable[[Batch], int | None]
"""Text tokens of a micro-batch that the trained model computes; None: all, padding included."""


class StepCost:
    """FLOPs of micro-batches: frozen encoders forward, trained model forward and backward.

    Recomputation (gradient checkpointing) is not counted: it is a way of doing the work, not the work.

    Args:
        flops_by_length: FLOPs of one sample at `LENGTHS`; one figure where there is no text.
        flops_by_padding: of those, what a padding token takes that the trained model can be spared.
        num_computed: how many tokens it computes.
    """

    def __init__(
        self,
        flops_by_length: Sequence[float],
        flops_by_padding: float = 0.0,
        num_computed: NumComputed = lambda batch: None,
    ) -> None:
        self._flops_by_length = flops_by_length
        self._flops_by_padding = flops_by_padding
        self._num_computed = num_computed

    def sample(self, text_length: int) -> float:
        """FLOPs of a sample with the padding of its text to a length; any number where there is no text."""
        if len(self._flops_by_length) == 1:
            return self._flops_by_length[0]
        first, second, third = self._flops_by_length
        step, bend = second - first, third - 2 * second + first
        distance = text_length - LENGTHS[0]
        return first + step * distance + bend * (distance * (distance - 1) // 2)  # Newton's interpolation

    def __call__(self, microbatches: Sequence[Batch]) -> float:
        """FLOPs of some micro-batches. Looks at shapes only: no host sync."""
        return sum(map(self._of, microbatches))

    def _of(self, batch: Batch) -> float:
        num_tokens = len(batch) * batch.text_length
        num_computed = self._num_computed(batch)
        num_spared = 0 if num_computed is None else num_tokens - num_computed
        return len(batch) * self.sample(batch.text_length) - num_spared * self._flops_by_padding


def step_cost(
    config: Config, folders: Folders, objective: Objective, cache: CacheDescription | None = None
) -> StepCost:
    """Counts a sample of a training step; with a cache there is nothing to encode."""
    plan = model_plan(replace(config, parallel=ParallelConfig()), folders.source)  # nothing recomputed
    light: Objective = _without_memory(objective)
    with torch.device("meta"):
        model = plan.build()

    def flops(objective: Objective, text_length: int, num_padding: int = 0) -> float:
        def step() -> None:
            sample = (
                blank_batch(cache, text_length, torch.device("meta"))
                if cache is not None
                else _sample(config, folders, text_length)
            )
            sample = replace(sample, num_text_tokens=sample.num_text_tokens - num_padding)
            objective.losses(model, _in_fp32(objective.prepare(sample)))

        return count_flops(step)

    if not isinstance(light, PriorObjective):
        return StepCost([flops(light, LENGTHS[0])])
    flops_by_length = [flops(light, length) for length in LENGTHS]
    if light.token_multiple is None:
        return StepCost(flops_by_length)
    without_padding = flops(replace(light, token_multiple=0), LENGTHS[-1], num_padding=1)
    return StepCost(flops_by_length, flops_by_length[-1] - without_padding, light.num_computed_tokens)


def _sample(config: Config, folders: Folders, text_length: int) -> Batch:
    """A micro-batch of one sample in the shapes that the run's loader gives."""
    is_prior = config.stage == "prior"
    tokens_BL = torch.zeros(1, text_length, dtype=torch.int64)
    return Batch(
        positions_B=torch.zeros(1, dtype=torch.int64),
        keys=[""],
        clip_pixels_BCHW=_pixels(clip_preprocessing(folders.prior).size),
        pixels_BCHW=None if is_prior else _pixels(config.data.resolution),
        token_ids_BL=tokens_BL if is_prior else None,
        token_mask_BL=tokens_BL.to(torch.bool) if is_prior else None,
        num_text_tokens=text_length if is_prior else 0,
    )


def _pixels(side: int) -> Tensor:
    return torch.zeros(1, 3, side, side, dtype=torch.uint8)


def _in_fp32(prepared: Prepared) -> Prepared:
    """What engines do to a model's inputs: its own type, here fp32, whatever the encoders' is."""
    conditions = {
        name: value.to(torch.float32) if value.is_floating_point() else value
        for name, value in prepared.conditions.items()
    }
    return replace(prepared, conditions=conditions)


def _without_memory(value: Any) -> Any:
    """An objective with its networks and tensors as they are, but for the memory that they hold."""
    if isinstance(value, nn.Module):
        return without_memory(value)
    if isinstance(value, Tensor):
        return value.to("meta")
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: _without_memory(getattr(value, item.name)) for item in fields(value)}
        return replace(value, **parts)
    return value
