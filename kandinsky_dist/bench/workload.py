"""What the benches of training compute: real networks with random weights, on random batches.

The batches are tensors in the shapes that the frozen encoders give.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import Stage
from kandinsky_dist.models.architectures import DECODER_SCHEDULER, MAX_TOKENS, Size, architecture
from kandinsky_dist.models.load import freeze_statistics
from kandinsky_dist.models.zero_init import outside_zero_init
from kandinsky_dist.objectives.base import Objective, Prepared
from kandinsky_dist.objectives.decoder import DecoderObjective
from kandinsky_dist.objectives.noise import NoiseSchedule
from kandinsky_dist.objectives.pixels import Normalisation
from kandinsky_dist.objectives.prior import PriorObjective
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.train.build import prior_schedule


def build(stage: Stage, size: Size) -> nn.Module:
    """The network's structure in fp32, as a training run builds it."""
    from diffusers import PriorTransformer, UNet2DConditionModel

    from kandinsky_dist.models.prior import make_pad_free

    shapes = architecture(size)
    module: nn.Module = (
        PriorTransformer.from_config(shapes.prior)
        if stage == "prior"
        else UNet2DConditionModel.from_config(shapes.unet)
    )
    freeze_statistics(module)
    if stage == "prior":
        make_pad_free(module)
    return module.train()


def random_weights(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights by name, small enough that no loss overflows; drawing them once is faster than initialising."""
    with outside_zero_init(), torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    return {name: torch.empty(shape).uniform_(-0.02, 0.02) for name, shape in shapes.items()}


def workload(
    stage: Stage, size: Size, process: Process, *, num_samples: int = 1, num_tokens: int = MAX_TOKENS
) -> tuple[Objective, Prepared]:
    """The stage's loss and a micro-batch as its frozen encoders would leave it, of texts without padding."""
    shapes = architecture(size)
    normal = partial(torch.randn, device=process.device)
    first = process.rank * num_samples
    positions_B = torch.arange(first, first + num_samples, device=process.device)
    # Encoders and pixel statistics have done their part before the loss; it does not look at them.
    absent: dict[str, Any] = {"image_encoder": nn.Identity(), "seed": 0}
    pixels = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), torch.float32)
    if stage == "prior":
        mask_BT = torch.ones(num_samples, num_tokens, dtype=torch.bool, device=process.device)
        width = shapes.prior["embedding_dim"]
        prepared = Prepared(
            positions_B,
            normal(num_samples, width),
            {
                "proj_embedding": normal(num_samples, width),
                "encoder_hidden_states": normal(num_samples, num_tokens, width),
                "attention_mask": mask_BT,
            },
        )
        statistics_D = torch.ones(width, device=process.device)
        prior = PriorObjective(
            text_encoder=nn.Identity(),
            clip_mean_D=statistics_D,
            clip_std_D=statistics_D,
            schedule=prior_schedule().to(process.device),
            normalisation=pixels,
            **absent,
        )
        return prior, prepared
    from diffusers import DDPMScheduler

    side, width = shapes.unet["sample_size"], shapes.unet["encoder_hid_dim"]
    decoder = DecoderObjective(
        movq=nn.Identity(),
        zero_embedding_D=torch.zeros(width, device=process.device),
        schedule=NoiseSchedule.of_scheduler(DDPMScheduler(**DECODER_SCHEDULER)).to(process.device),
        clip_normalisation=pixels,
        movq_normalisation=pixels,
        image_embedding_dropout=0.0,
        **absent,
    )
    latents_BCHW = normal(num_samples, shapes.unet["in_channels"], side, side)
    return decoder, Prepared(positions_B, latents_BCHW, {"image_embeds": normal(num_samples, width)})
