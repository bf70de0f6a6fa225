"""From a configuration to the parts of a run. Nothing here is collective."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.config.resolve import run_dir
from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.cache_description import CacheDescription
from kandinsky_dist.models import blocks, compiled, layout
from kandinsky_dist.models.fingerprint import weights_fingerprint
from kandinsky_dist.models.float8 import refuse_unless_here, use_float8
from kandinsky_dist.models.frozen import clip_preprocessing, load_image_encoder, load_movq, load_text_encoder
from kandinsky_dist.models.load import ModelSource, freeze_statistics, pipeline_folder
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.objectives.decoder import DecoderObjective
from kandinsky_dist.objectives.noise import NoiseSchedule
from kandinsky_dist.objectives.pixels import MOVQ_STATISTICS, Normalisation
from kandinsky_dist.objectives.prior import PriorObjective
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import ModelPlan

PRIOR_COMPONENTS = ("prior", "text_encoder", "tokenizer", "image_encoder", "image_processor")
DECODER_COMPONENTS = ("unet", "movq", "scheduler")
CONDITIONING_COMPONENTS = ("image_encoder", "image_processor")


@dataclass(frozen=True)
class Folders:
    """Pipeline folders of a run: CLIP is always the prior pipeline's.

    `weights` is the folder of the trained network where the pipeline's own is not begun with.
    """

    prior: Path
    decoder: Path | None
    weights: Path | None = None

    @classmethod
    def of(cls, config: Config) -> "Folders":
        """Resolves and checks the folders or hub names that the stage reads."""
        if config.stage == "prior":
            found = cls(pipeline_folder(config.model.prior, "model.prior", PRIOR_COMPONENTS), None)
        else:
            found = cls(
                pipeline_folder(config.model.prior, "model.prior", CONDITIONING_COMPONENTS),
                pipeline_folder(config.model.decoder, "model.decoder", DECODER_COMPONENTS),
            )
        if config.model.weights is None:
            return found
        return replace(found, weights=found.source.with_weights(config.model.weights).weights)

    @property
    def prior_networks(self) -> tuple[str, ...]:
        """Those of the prior pipeline's networks that the stage reads."""
        return ("prior", "text_encoder", "image_encoder") if self.decoder is None else ("image_encoder",)

    @property
    def source(self) -> ModelSource:
        """The network that is trained."""
        if self.decoder is None:
            return ModelSource(self.prior, "prior", self.weights)
        return ModelSource(self.decoder, "unet", self.weights)


def model_plan(config: Config, source: ModelSource) -> ModelPlan:
    """How the strategy makes the trained model and its optimizer.

    Raises:
        ConfigError: this machine cannot do what parallel.float8 asks for.
    """
    if config.parallel.float8:
        refuse_unless_here()

    def build() -> nn.Module:
        module = source.build()
        freeze_statistics(module)
        if config.stage == "prior":
            from kandinsky_dist.models.prior import make_pad_free

            make_pad_free(module)
        if config.model.variant == "lora":
            from kandinsky_dist.models.lora import add_adapters

            add_adapters(module, config.model.lora_rank)
        if config.parallel.float8:
            use_float8(module)
        blocks.set_attention(module, config.parallel.attention)
        if config.stage == "decoder":
            chosen = layout.is_channels_last(config.parallel.channels_last)
            layout.lay_out_activations(module, channels_last=chosen)
        if config.parallel.gradient_checkpointing:
            blocks.enable_gradient_checkpointing(module)
        if config.parallel.compile:
            compiled.compile_blocks(module)
        return module

    def state_dict() -> Mapping[str, Tensor]:
        if config.model.variant != "lora":
            return source.state_dict()
        from kandinsky_dist.models.lora import under_adapters

        return under_adapters(source, config.model.lora_rank)

    return ModelPlan(
        build=build,
        state_dict=state_dict,
        optimizer=partial(build_adamw, config=config.optim),
    )


def token_multiple(config: Config) -> int:
    """See `PriorObjective`: where code is compiled, every number of tokens is another shape."""
    return 2 if config.parallel.compile else 0


def prepare_kernels(config: Config, device: torch.device, precision: torch.dtype) -> None:
    """Makes sure of the kernels that are asked for, before anything slow is built.

    Raises:
        ConfigError: there is no such attention kernel, or no compiler.
    """
    is_masked = config.stage == "prior"
    blocks.check_attention(config.parallel.attention, device, precision, is_masked=is_masked)
    if config.parallel.compile:
        chosen = config.parallel.compile_cache or os.environ.get(compiled.CACHE_VARIABLE)
        compiled.prepare_compiler(device, Path(chosen) if chosen else run_dir(config) / "compile_cache")


def build_objective(
    config: Config,
    folders: Folders,
    device: torch.device,
    precision: torch.dtype,
    cache: CacheDescription | None = None,
) -> Objective:
    """The stage's objective with its frozen encoders on the device, in the engine's precision.

    With a cache, whose batches bring the encoders' outputs along, none is loaded.
    """
    clip = clip_preprocessing(folders.prior)
    image_encoder = load_image_encoder(folders.prior, precision, device) if cache is None else None
    normalisation = Normalisation(clip.mean, clip.std, precision)
    if folders.decoder is None:
        weights = folders.source.state_dict()
        text_encoder = load_text_encoder(folders.prior, precision, device) if cache is None else None
        if config.parallel.compile:
            for encoder in filter(None, (image_encoder, text_encoder)):
                compiled.compile_encoder(encoder)
        return PriorObjective(
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            clip_mean_D=weights["clip_mean"].to(device, torch.float32).flatten(),
            clip_std_D=weights["clip_std"].to(device, torch.float32).flatten(),
            schedule=prior_schedule().to(device),
            normalisation=normalisation,
            seed=config.run.seed,
            snr_gamma=config.objective.snr_gamma,
            noise_draws=config.objective.noise_draws,
            token_multiple=token_multiple(config),
        )
    movq = None
    if cache is not None:
        zero_embedding_D = cache.constants["image_embeds"].to(device, torch.float32)
    else:
        assert image_encoder is not None
        zeros = torch.zeros(1, 3, clip.size, clip.size, device=device, dtype=precision)
        with torch.no_grad():
            zero_embedding_D = image_encoder(zeros).image_embeds[0].to(torch.float32)
        movq = load_movq(folders.decoder, precision, device, encode_only=True)
        if layout.is_channels_last(config.parallel.channels_last):
            layout.lay_out_weights(movq)
        if config.parallel.compile:
            compiled.compile_encoder(image_encoder)
            compiled.compile_encoder(movq)
    return DecoderObjective(
        image_encoder=image_encoder,
        movq=movq,
        zero_embedding_D=zero_embedding_D,
        schedule=decoder_schedule(folders.decoder).to(device),
        clip_normalisation=normalisation,
        movq_normalisation=Normalisation(MOVQ_STATISTICS, MOVQ_STATISTICS, precision),
        image_embedding_dropout=config.data.image_embedding_dropout,
        seed=config.run.seed,
        snr_gamma=config.objective.snr_gamma,
    )


def prior_schedule() -> NoiseSchedule:
    """The prior's training schedule: cosine, predicting the sample.

    The pipeline's own scheduler (UnCLIP) is for inference and cannot add noise; its betas are the same.
    """
    from diffusers import DDPMScheduler

    return NoiseSchedule.of_scheduler(
        DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    )


def decoder_schedule(folder: Path) -> NoiseSchedule:
    """The decoder pipeline's own schedule: linear betas, predicting the noise."""
    from diffusers import DDPMScheduler

    return NoiseSchedule.of_scheduler(DDPMScheduler.from_pretrained(folder, subfolder="scheduler"))


def identity(config: Config, folders: Folders) -> dict[str, Any]:
    """Configuration key -> value or fingerprint of the model that a resumed run must share."""
    found: dict[str, Any] = {
        "stage": config.stage,
        **{key: config.get(key) for key in ("model.variant", "objective.snr_gamma")},
    }
    if config.stage == "prior":
        found["objective.noise_draws"] = config.objective.noise_draws
    if config.model.variant == "lora":
        found["model.lora_rank"] = config.model.lora_rank
    weights = {"model.prior": weights_fingerprint(folders.prior, folders.prior_networks)}
    if folders.decoder is not None:
        weights["model.decoder"] = weights_fingerprint(folders.decoder, ("unet", "movq"))
    if folders.weights is not None:
        weights["model.weights"] = weights_fingerprint(folders.weights.parent, (folders.weights.name,))
    found["model.weights"] = None
    for key, fingerprint in weights.items():
        found[key] = f"weights {fingerprint[:16]}"
    found[f"model.{config.stage}"] += f" of architecture {folders.source.fingerprint[:16]}"
    return found
