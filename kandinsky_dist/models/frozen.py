"""The frozen networks: loaded whole, outside DeepSpeed's partitioned initialisation, in evaluation mode."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import CLIP_MEAN, CLIP_STD
from kandinsky_dist.models.quiet import quiet_libraries
from kandinsky_dist.models.zero_init import outside_zero_init

__all__ = [
    "ClipPreprocessing",
    "clip_preprocessing",
    "load_image_encoder",
    "load_movq",
    "load_text_encoder",
    "outside_zero_init",
]


@dataclass(frozen=True)
class ClipPreprocessing:
    """How pixels in [0, 1] become the image encoder's input."""

    size: int
    """Side of the square crop, pixels; the shortest edge is resized to it (bicubic)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def clip_preprocessing(folder: Path) -> ClipPreprocessing:
    """Reads image_processor/preprocessor_config.json of a prior pipeline folder.

    Raises:
        ConfigError: the file is unreadable, or its side is not the image encoder's.
    """
    path = folder / "image_processor" / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
        size = _side(settings.get("crop_size", settings.get("size", 224)))
        mean = tuple(float(value) for value in settings.get("image_mean", CLIP_MEAN))
        std = tuple(float(value) for value in settings.get("image_std", CLIP_STD))
        expected = json.loads((folder / "image_encoder" / "config.json").read_text("utf-8")).get(
            "image_size", 224
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as a CLIP image processor: {error}") from error
    if size != expected:
        raise ConfigError(f"{path} crops to {size} px, but the image encoder takes {expected} px")
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"{path} has {len(mean)} means and {len(std)} deviations; RGB needs 3 of each")
    return ClipPreprocessing(size, mean, std)


def _side(value: Any) -> int:
    if isinstance(value, dict):
        return int(value["height"] if "height" in value else value["shortest_edge"])
    return int(value)


def load_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """CLIP's text tower of a prior folder: token ids -> text_embeds (B, D), last_hidden_state (B, L, D)."""
    from transformers import CLIPTextModelWithProjection

    return _load_transformers(CLIPTextModelWithProjection, folder, "text_encoder", dtype, device)


def load_image_encoder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """CLIP's vision tower of a prior folder: pixels (B, 3, H, W) -> image_embeds (B, D)."""
    from transformers import CLIPVisionModelWithProjection

    return _load_transformers(CLIPVisionModelWithProjection, folder, "image_encoder", dtype, device)


def load_movq(
    folder: Path, dtype: torch.dtype, device: torch.device | str, *, encode_only: bool = False
) -> nn.Module:
    """MoVQ of a decoder pipeline folder: `encode(pixels in [-1, 1]).latents`, neither quantised nor scaled.

    Args:
        folder: decoder pipeline.
        dtype: of the weights and so of the input.
        device: where it runs.
        encode_only: drop the decoder and the codebook, 60% of the weights, which training never needs.
    """
    from diffusers import VQModel

    with outside_zero_init(), quiet_libraries():
        model = _load(VQModel, folder / "movq", torch_dtype=dtype)
        if encode_only:
            del model.decoder, model.post_quant_conv, model.quantize
        return _freeze(model, device)


def _load_transformers(
    model_class: Any, folder: Path, component: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    with outside_zero_init(), quiet_libraries():
        return _freeze(_load(model_class, folder / component, dtype=dtype), device)


def _load(model_class: Any, path: Path, **settings: Any) -> Any:
    """A network from its own folder.

    Raises:
        ConfigError: weights and config.json do not belong together. The libraries would fill a weight that
            the file lacks with random values and go on.
    """
    try:
        model, found = model_class.from_pretrained(
            path, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        # What follows the first sentence is advice to programmers.
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        raise ConfigError(
            f"{path} cannot be loaded as a {model_class.__name__}: the weights are not those of its "
            f"config.json, or a file is damaged ({reason}); copy or download it again"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}: copy or "
            "download it again"
        )
    return model


def _freeze(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.eval().requires_grad_(False).to(device)
