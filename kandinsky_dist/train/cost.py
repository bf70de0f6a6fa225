"""What a step costs, counted without computing it: the work that is done, padding and all, and no other."""

from collections.abc import Sequence
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
from kandinsky_dist.telemetry.flops import count_flops, without_memory
from kandinsky_dist.train.build import Folders, model_plan

LENGTHS = (2, 3, 4)
"""Text lengths at which a sample is counted: products are linear in the length, attention is quadratic."""


class StepCost:
    """FLOPs of micro-batches: frozen encoders forward, trained model forward and backward.

    Recomputation (gradient checkpointing) is not counted: it is a way of doing the work, not the work.

    Args:
        flops_by_length: FLOPs of one sample at `LENGTHS`; one figure where there is no text.
    """

    def __init__(self, flops_by_length: Sequence[float]) -> None:
        self._flops_by_length = flops_by_length

    def sample(self, num_text_tokens: int) -> float:
        """FLOPs of a sample whose text is padded to so many tokens; any number where there is no text."""
        if len(self._flops_by_length) == 1:
            return self._flops_by_length[0]
        first, second, third = self._flops_by_length
        step, bend = second - first, third - 2 * second + first
        distance = num_text_tokens - LENGTHS[0]
        return first + step * distance + bend * (distance * (distance - 1) // 2)  # Newton's interpolation

    def __call__(self, microbatches: Sequence[Batch]) -> float:
        """FLOPs of some micro-batches. Looks at shapes only: no host sync."""
        return sum(len(batch) * self.sample(batch.num_text_tokens) for batch in microbatches)


def step_cost(
    config: Config, folders: Folders, objective: Objective, cache: CacheDescription | None = None
) -> StepCost:
    """Counts a sample of a training step; with a cache there is nothing to encode."""
    plan = model_plan(replace(config, parallel=ParallelConfig()), folders.source)  # nothing recomputed
    objective = _without_memory(objective)
    with torch.device("meta"):
        model = plan.build()

    def step(num_text_tokens: int) -> None:
        sample = (
            blank_batch(cache, num_text_tokens, torch.device("meta"))
            if cache is not None
            else _sample(config, folders, num_text_tokens)
        )
        prepared = objective.prepare(sample)
        objective.losses(model, _in_fp32(prepared))

    lengths = LENGTHS if config.stage == "prior" else LENGTHS[:1]
    return StepCost([count_flops(lambda length=length: step(length)) for length in lengths])  # type: ignore[misc]


def _sample(config: Config, folders: Folders, num_text_tokens: int) -> Batch:
    """A micro-batch of one sample in the shapes that the run's loader gives."""
    is_prior = config.stage == "prior"
    tokens_BL = torch.zeros(1, num_text_tokens, dtype=torch.int64)
    return Batch(
        positions_B=torch.zeros(1, dtype=torch.int64),
        keys=[""],
        clip_pixels_BCHW=_pixels(clip_preprocessing(folders.prior).size),
        pixels_BCHW=None if is_prior else _pixels(config.data.resolution),
        token_ids_BL=tokens_BL if is_prior else None,
        token_mask_BL=tokens_BL.to(torch.bool) if is_prior else None,
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
