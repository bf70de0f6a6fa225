"""The baseline: one training step in the way of diffusers' example scripts, on the same samples and weights.

Every step runs the frozen encoders on captions padded to 77 tokens and on pictures that Pillow and
CLIPImageProcessor have prepared in the training process; accelerate accumulates and clips; AdamW is not
fused; each micro-batch's loss is gathered over the ranks and read by the host, twice. What must differ from
the scripts so that both sides do the same work: no data is shuffled twice (the order is the run's own), and
the statistics that forward never uses are frozen, without which several processes cannot train the prior.

Shapes: B samples, L tokens, D embedding width, C channels, H and W latent pixels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kandinsky_dist.config.loader import DEFAULT_ORIGIN, Resolved
from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.load import freeze_statistics
from kandinsky_dist.telemetry.flops import count_flops, without_memory

WAYS = (
    "run.", "parallel.", "checkpoint.", "guard.", "telemetry.", "validation.", "data.num_workers",
    "data.source",
)  # fmt: skip
"""Beginnings of settings that say how the work is done, which is what is compared."""
FOLLOWED = (
    "model.prior", "model.decoder", "data.shards", "data.mixture", "data.captions", "data.global_batch_size",
    "data.micro_batch_size", "data.resolution", "data.cache_dir", "data.cache_gib", "data.read_ahead_mib",
    "optim.learning_rate", "optim.adam_beta1", "optim.adam_beta2", "optim.adam_epsilon",
    "optim.weight_decay", "optim.max_grad_norm",
)  # fmt: skip
"""Settings of the work itself that the baseline takes over. It cannot follow any other."""
DROPOUT = ("data.caption_dropout", "data.image_embedding_dropout")
"""It has none."""


def check_followed(resolved: Resolved) -> None:
    """Makes sure that the baseline can do the work that the settings ask for.

    Raises:
        ConfigError: a setting changes the work in a way that it cannot follow.
    """
    config = resolved.config
    for key, origin in resolved.origins.items():
        is_off = key in DROPOUT and config.get(key) == 0
        is_default = origin == DEFAULT_ORIGIN or key in FOLLOWED or key.startswith(WAYS)
        if key == "parallel.gradient_checkpointing" and config.get(key):
            is_default = False
        if not is_off and not is_default:
            raise ConfigError(
                f"{key}={config.get(key)} is nothing that the incumbent's way can follow, and the two would "
                "not do the same work: leave it out, or compare our own cases alone with --no-baseline"
            )


Draws = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From what is diffused, (B, ...), and positions (B,): noise of the same shape, and timesteps (B,)."""


def random_draws(clean: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and timesteps by torch's generator, as the scripts draw them."""
    timesteps_B = torch.randint(0, 1000, positions_B.shape, device=clean.device)
    return torch.randn_like(clean), timesteps_B


@dataclass(frozen=True)
class Noised:
    """A micro-batch as the network is shown it, in the precision of the frozen encoders."""

    noisy: Tensor
    timesteps_B: Tensor
    target: Tensor
    conditions: dict[str, Tensor]


class Networks(Protocol):
    """A stage's networks: `trained` alone has gradients."""

    trained: nn.Module

    def encode(self, batch: dict[str, Tensor], draws: Draws) -> Noised:
        """Frozen encoders and noising. No gradient."""

    def predict(self, noised: Noised) -> Tensor:
        """What the network says of it, in the shape of the target."""


class PriorNetworks:
    """Prior, both CLIP towers and the cosine schedule."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from diffusers import DDPMScheduler, PriorTransformer
        from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

        self._text = frozen(CLIPTextModelWithProjection, folder / "text_encoder", dtype, device)
        self._vision = frozen(CLIPVisionModelWithProjection, folder / "image_encoder", dtype, device)
        self._scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        self.trained: Any = PriorTransformer.from_pretrained(folder / "prior", torch_dtype=torch.float32)
        self._mean_1D = self.trained.clip_mean.detach().clone().to(device, dtype)
        self._std_1D = self.trained.clip_std.detach().clone().to(device, dtype)

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor], draws: Draws) -> Noised:
        """Text at 77 tokens, image embedding, noise."""
        text = self._text(batch["tokens_BL"])
        embeds_BD = self._vision(batch["clip_BCHW"].to(self._mean_1D.dtype)).image_embeds
        clean_BD = (embeds_BD - self._mean_1D) / self._std_1D
        noise_BD, timesteps_B = draws(clean_BD, batch["positions_B"])
        return Noised(
            self._scheduler.add_noise(clean_BD, noise_BD, timesteps_B),
            timesteps_B,
            clean_BD,
            {
                "proj_embedding": text.text_embeds,
                "encoder_hidden_states": text.last_hidden_state,
                "attention_mask": batch["mask_BL"],
            },
        )

    def predict(self, noised: Noised) -> Tensor:
        """The clean embedding, at all 81 positions."""
        predicted: Tensor = self.trained(
            noised.noisy, timestep=noised.timesteps_B, **noised.conditions
        ).predicted_image_embedding
        return predicted


class DecoderNetworks:
    """U-Net, MoVQ, CLIP's vision tower and the decoder's own schedule."""

    def __init__(self, prior: Path, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel
        from transformers import CLIPVisionModelWithProjection

        self._dtype = dtype
        self._vision = frozen(CLIPVisionModelWithProjection, prior / "image_encoder", dtype, device)
        self._movq = frozen(VQModel, folder / "movq", dtype, device)
        self._scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.trained: Any = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor], draws: Draws) -> Noised:
        """Latents, image embedding, noise."""
        latents_BCHW = self._movq.encode(batch["pixels_BCHW"].to(self._dtype)).latents
        embeds_BD = self._vision(batch["clip_BCHW"].to(self._dtype)).image_embeds
        noise_BCHW, timesteps_B = draws(latents_BCHW, batch["positions_B"])
        noisy_BCHW = self._scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
        return Noised(noisy_BCHW, timesteps_B, noise_BCHW, {"image_embeds": embeds_BD})

    def predict(self, noised: Noised) -> Tensor:
        """The noise: the first half of the channels."""
        predicted_BCHW: Tensor = self.trained(
            noised.noisy,
            noised.timesteps_B,
            encoder_hidden_states=None,
            added_cond_kwargs=noised.conditions,
        ).sample
        return predicted_BCHW[:, : noised.target.shape[1]]


def frozen(kind: Any, path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A network that is only run, by its library's own loader."""
    key = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    return kind.from_pretrained(path, **{key: dtype}).requires_grad_(False).eval().to(device)


def networks(config: Config, dtype: torch.dtype, device: torch.device) -> Networks:
    """The stage's networks, from the folders that the configuration names."""
    prior = Path(config.model.prior)
    if config.stage == "prior":
        found: Networks = PriorNetworks(prior, dtype, device)
    else:
        found = DecoderNetworks(prior, Path(config.model.decoder), dtype, device)
    freeze_statistics(found.trained)
    found.trained.train()
    return found


def mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Over all values, in fp32."""
    return nn.functional.mse_loss(predicted.float(), target.float())


def flops_per_sample(found: Networks, batch: dict[str, Tensor]) -> float:
    """FLOPs of a sample's step, without computing it: everything forward, the trained network backward.

    Args:
        found: the networks; they stay as they are.
        batch: micro-batch, of which the shapes count.
    """
    light: Any = copy.copy(found)
    for name, value in vars(found).items():
        setattr(light, name, _without_memory(value))
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}

    def step() -> None:
        noised = light.encode(shapes, random_draws)
        conditions = {name: _in_fp32(tensor) for name, tensor in noised.conditions.items()}
        noised = Noised(_in_fp32(noised.noisy), noised.timesteps_B, noised.target, conditions)
        mean_squared_error(light.predict(noised), noised.target)

    return count_flops(step) / len(batch["positions_B"])


def _without_memory(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return without_memory(value)
    return value.to("meta") if isinstance(value, Tensor) else copy.deepcopy(value)


def _in_fp32(tensor: Tensor) -> Tensor:
    """As autocast lets the trained network take what half-precision encoders say."""
    return tensor.float() if tensor.is_floating_point() else tensor
