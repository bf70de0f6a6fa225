"""The frozen encoders of a stage, and what they say of a batch.

Shapes: B samples, F 1 or 2 views (as it is, mirrored), L text states, D widths, C, H, W latents.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.captions import CaptionSource, SoleCaption
from kandinsky_dist.data.rows import Views
from kandinsky_dist.models.frozen import (
    clip_preprocessing,
    load_image_encoder,
    load_movq,
    load_text_encoder,
)
from kandinsky_dist.models.tokenizer import load_tokenizer
from kandinsky_dist.objectives.pixels import MOVQ_STATISTICS, Normalisation

SMALLEST_IMAGE = 64
"""Pixels of a side, of the zero image by which MoVQ's latents are measured."""


class Encoders(Protocol):
    """The encoders of a stage on a device.

    Attributes:
        views: what they are to be given of a sample.
    """

    views: Views

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by name, (B, ...) on the device, in the encoders' precision: the parts of a record."""

    def constants(self) -> dict[str, Tensor]:
        """Outputs that belong to no sample; see `CacheDescription`."""

    def widths(self) -> dict[str, int]:
        """Sizes of the outputs; see `CacheDescription`."""


class PriorEncoders:
    """CLIP's two towers."""

    def __init__(
        self, folder: Path, captions: str, device: torch.device, precision: torch.dtype, *, flip: bool
    ) -> None:
        clip = clip_preprocessing(folder)
        self.views = Views(
            clip_size=clip.size,
            resolution=None,
            tokenize=load_tokenizer(folder),
            captions=SoleCaption((CaptionSource.parse(captions),), 0),
            seed=0,
        )
        self._text_encoder = load_text_encoder(folder, precision, device)
        self._image_encoder = load_image_encoder(folder, precision, device)
        self._normalisation = Normalisation(clip.mean, clip.std, precision)
        self._device = device
        self._flip = flip

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """See `Encoders`. Text may be cut to the batch's longest caption: the encoder is causal."""
        assert batch.clip_pixels_BCHW is not None
        assert batch.token_ids_BL is not None
        embeds = [
            self._image_encoder(self._normalisation(pixels_BCHW)).image_embeds
            for pixels_BCHW in _both_ways(batch.clip_pixels_BCHW, self._flip)
        ]
        text = self._text_encoder(batch.token_ids_BL)
        return {
            "image_embeds": torch.stack(embeds, 1),
            "text_embeds": text.text_embeds,
            "text_states": text.last_hidden_state,
        }

    @torch.no_grad()
    def constants(self) -> dict[str, Tensor]:
        """Of the empty caption."""
        assert self.views.tokenize is not None
        ids_BL, mask_BL = self.views.tokenize([""])
        text = self._text_encoder(ids_BL[:, : int(mask_BL.sum())].to(self._device))
        return {"text_embeds": text.text_embeds[0], "text_states": text.last_hidden_state[0]}

    def widths(self) -> dict[str, int]:
        """See `Encoders`."""
        text: Any = self._text_encoder.config
        image: Any = self._image_encoder.config
        return {
            "image_embeds": image.projection_dim,
            "text_embeds": text.projection_dim,
            "text_states": text.hidden_size,
        }


class DecoderEncoders:
    """CLIP's vision tower and MoVQ's encoder."""

    def __init__(
        self,
        prior_folder: Path,
        decoder_folder: Path,
        resolution: int,
        device: torch.device,
        precision: torch.dtype,
        *,
        flip: bool,
    ) -> None:
        clip = clip_preprocessing(prior_folder)
        self.views = Views(clip_size=clip.size, resolution=resolution, tokenize=None, captions=None, seed=0)
        self._image_encoder = load_image_encoder(prior_folder, precision, device)
        self._movq = load_movq(decoder_folder, precision, device, encode_only=True)
        self._clip_normalisation = Normalisation(clip.mean, clip.std, precision)
        self._movq_normalisation = Normalisation(MOVQ_STATISTICS, MOVQ_STATISTICS, precision)
        self._device = device
        self._precision = precision
        self._flip = flip

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """See `Encoders`."""
        assert batch.clip_pixels_BCHW is not None
        assert batch.pixels_BCHW is not None
        embeds = [
            self._image_encoder(self._clip_normalisation(pixels_BCHW)).image_embeds
            for pixels_BCHW in _both_ways(batch.clip_pixels_BCHW, self._flip)
        ]
        latents = [
            self._movq.encode(self._movq_normalisation(pixels_BCHW)).latents  # type: ignore[operator]
            for pixels_BCHW in _both_ways(batch.pixels_BCHW, self._flip)
        ]
        return {"image_embeds": torch.stack(embeds, 1), "latents": torch.stack(latents, 1)}

    @torch.no_grad()
    def constants(self) -> dict[str, Tensor]:
        """Of a zero image, which the guidance branch is conditioned on."""
        return {"image_embeds": self._image_encoder(self._zeros(self.views.clip_size)).image_embeds[0]}

    @torch.no_grad()
    def widths(self) -> dict[str, int]:
        """See `Encoders`."""
        _, channels, height, _ = self._movq.encode(self._zeros(SMALLEST_IMAGE)).latents.shape  # type: ignore[operator]
        image: Any = self._image_encoder.config
        return {
            "image_embeds": image.projection_dim,
            "latents": channels,
            "pixels": SMALLEST_IMAGE // height,
        }

    def _zeros(self, side: int | None) -> Tensor:
        assert side is not None
        return torch.zeros(1, 3, side, side, device=self._device, dtype=self._precision)


def _both_ways(pixels_BCHW: Tensor, flip: bool) -> list[Tensor]:
    return [pixels_BCHW, pixels_BCHW.flip(-1)] if flip else [pixels_BCHW]
