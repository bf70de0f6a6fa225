"""A run's networks as structures without memory: the one that is trained, and the frozen encoders.

Everything here is made and used under `torch._subclasses.FakeTensorMode`; no file of weights is opened.
Letters of shapes: B samples, C channels, H x W pixels, L text tokens, D embedding width.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import DECODER_SCHEDULER, MAX_TOKENS, Size, architecture
from kandinsky_dist.models.load import Component, ModelSource
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.objectives.decoder import DecoderObjective
from kandinsky_dist.objectives.noise import NoiseSchedule
from kandinsky_dist.objectives.pixels import Normalisation
from kandinsky_dist.objectives.prior import PriorObjective
from kandinsky_dist.train.build import model_plan, prior_schedule

PUBLISHED: Size = "full"
"""The size that is assumed of a pipeline that is no folder here, such as a hub name."""

_HALF = (0.5, 0.5, 0.5)


class _Published(ModelSource):
    """The published network, whose shapes are known without its files."""

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What its config.json says."""
        shapes = architecture(PUBLISHED)
        return shapes.prior if self.component == "prior" else shapes.unet


@dataclass(frozen=True)
class Networks:
    """The networks of a run.

    Attributes:
        config: the run's, without what needs a GPU to be asked for its shapes: chosen attention kernels,
            compilation, float8.
        source: the network that is trained.
        encoders: configurations of the frozen networks that the stage runs, by name.
    """

    config: Config
    source: ModelSource
    encoders: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, config: Config) -> "Networks":
        """Those that the configuration names: of its folders, or the published ones where it names a hub."""
        is_prior = config.stage == "prior"
        component: Component = "prior" if is_prior else "unet"
        folder = Path(config.model.prior if is_prior else config.model.decoder).expanduser()
        encoders = ("text_encoder", "image_encoder") if is_prior else ("image_encoder", "movq")
        parallel = replace(
            config.parallel,
            attention="sdpa",
            compile=False,
            float8=False,
            channels_last=config.parallel.channels_last is not False,  # on a GPU the default is to
        )
        return cls(
            replace(config, parallel=parallel),
            (ModelSource if folder.is_dir() else _Published)(folder, component),
            {name: _encoder_config(config, name) for name in encoders},
        )

    @property
    def is_published(self) -> bool:
        """Whether the trained network's shapes are those of the published files, not of a folder."""
        return isinstance(self.source, _Published)

    @property
    def is_encoding(self) -> bool:
        """Whether the encoders run in training; precomputed samples carry what they would give."""
        return self.config.data.source in ("raw", "stream")

    def with_recomputation(self, is_recomputed: bool) -> "Networks":
        """The same with parallel.gradient_checkpointing on or off."""
        parallel = replace(self.config.parallel, gradient_checkpointing=is_recomputed)
        return replace(self, config=replace(self.config, parallel=parallel))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The trained network as the strategies get it: adapters, recomputation, trainable flags."""
        with _made_in(dtype):
            return model_plan(self.config, self.source).build()

    def build_encoder(self, name: str) -> nn.Module:
        """A frozen network; of MoVQ what training keeps."""
        from diffusers import VQModel
        from transformers import (
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )

        settings = self.encoders[name]
        module: nn.Module
        if name == "movq":
            module = VQModel.from_config(settings)
            del module.decoder, module.post_quant_conv, module.quantize
        elif name == "image_encoder":
            module = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
        else:
            module = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
        return module.eval().requires_grad_(False)

    def build_objective(self, dtype: torch.dtype) -> Objective:
        """The stage's loss with its encoders, in the type that they run in."""
        with _made_in(dtype):
            made: dict[str, Any] = {name: self.build_encoder(name) for name in self.encoders}
        pixels = Normalisation(_HALF, _HALF, dtype)
        seed, snr_gamma = self.config.run.seed, self.config.objective.snr_gamma
        width = self.encoders["image_encoder"]["projection_dim"]
        if self.config.stage == "prior":
            return PriorObjective(
                **made,
                clip_mean_D=torch.zeros(width),
                clip_std_D=torch.ones(width),
                schedule=prior_schedule(),
                normalisation=pixels,
                seed=seed,
                snr_gamma=snr_gamma,
                noise_draws=self.config.objective.noise_draws,
            )
        from diffusers import DDPMScheduler

        return DecoderObjective(
            **made,
            zero_embedding_D=torch.zeros(width),
            schedule=NoiseSchedule.of_scheduler(DDPMScheduler(**DECODER_SCHEDULER)),
            clip_normalisation=pixels,
            movq_normalisation=pixels,
            image_embedding_dropout=self.config.data.image_embedding_dropout,
            seed=seed,
            snr_gamma=snr_gamma,
        )

    def batch(self, num_samples: int, num_text_tokens: int = MAX_TOKENS) -> Batch:
        """Samples of the shapes that the loader gives."""
        is_prior = self.config.stage == "prior"

        def pixels(side: int) -> Tensor:
            return torch.zeros(num_samples, 3, side, side, dtype=torch.uint8)

        tokens_BL = torch.zeros(num_samples, num_text_tokens, dtype=torch.int64)
        return Batch(
            positions_B=torch.zeros(num_samples, dtype=torch.int64),
            keys=[""] * num_samples,
            clip_pixels_BCHW=pixels(self.encoders["image_encoder"]["image_size"]),
            pixels_BCHW=None if is_prior else pixels(self.config.data.resolution),
            token_ids_BL=tokens_BL if is_prior else None,
            token_mask_BL=torch.ones_like(tokens_BL, dtype=torch.bool) if is_prior else None,
            num_text_tokens=tokens_BL.numel() if is_prior else 0,
        )


def _encoder_config(config: Config, name: str) -> dict[str, Any]:
    """An encoder's config.json; the published one where the pipeline is no folder here."""
    folder = Path(config.model.decoder if name == "movq" else config.model.prior).expanduser()
    if not folder.is_dir():
        return dict(getattr(architecture(PUBLISHED), name))
    path = folder / name / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    # transformers writes what it knows of itself into the file, and takes no such arguments.
    return {key: value for key, value in found.items() if not key.startswith("_") and key != "architectures"}


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Makes weights in a type: fake ones cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
