"""What a step costs, counted without computing it."""

import torch
from torch import Tensor

from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.cache_description import CacheDescription
from kandinsky_dist.data.cached import blank_batch
from kandinsky_dist.models.frozen import clip_preprocessing
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.telemetry.flops import count_forward_flops
from kandinsky_dist.train.build import Folders

NUM_TEXT_TOKENS = 77
BACKWARD_RATIO = {"full": 2.0, "lora": 1.0}
"""Backward over forward: a product's gradient for its input, and one for its weight where that is trained."""


def flops_per_sample(
    config: Config,
    folders: Folders,
    objective: Objective,
    device: torch.device,
    cache: CacheDescription | None = None,
) -> float:
    """FLOPs of one sample of a training step: frozen encoders forward, trained model forward and backward.

    With a cache there is nothing to encode. Recomputation (gradient checkpointing) is not counted: it is a
    way of doing the work, not the work.
    """

    def batch() -> Batch:
        if cache is not None:
            return blank_batch(cache, NUM_TEXT_TOKENS, device)
        clip_size, is_prior = clip_preprocessing(folders.prior).size, config.stage == "prior"

        def pixels(side: int) -> Tensor:
            return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)

        tokens_BL = torch.zeros(1, NUM_TEXT_TOKENS, dtype=torch.int64, device=device)
        return Batch(
            positions_B=torch.zeros(1, dtype=torch.int64, device=device),
            keys=[""],
            clip_pixels_BCHW=pixels(clip_size),
            pixels_BCHW=None if is_prior else pixels(config.data.resolution),
            token_ids_BL=tokens_BL if is_prior else None,
            token_mask_BL=tokens_BL.to(torch.bool) if is_prior else None,
        )

    def step() -> Tensor:
        with device:
            model = folders.source.build()
        return objective.losses(model, objective.prepare(batch()))

    frozen, whole = count_forward_flops(lambda: objective.prepare(batch())), count_forward_flops(step)
    return frozen + (1.0 + BACKWARD_RATIO[config.model.variant]) * (whole - frozen)
