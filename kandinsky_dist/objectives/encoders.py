"""What the outputs of frozen encoders depend on, beside the sample: a run and a cache must agree on it."""

from pathlib import Path
from typing import Any

from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.captions import CaptionSource
from kandinsky_dist.models.fingerprint import weights_fingerprint
from kandinsky_dist.models.frozen import clip_preprocessing


def encoder_settings(
    config: Config, prior_folder: Path, decoder_folder: Path | None, *, aspect_buckets: bool
) -> dict[str, Any]:
    """Name -> value of all that decides what the encoders say of a sample, JSON values only.

    Args:
        config: of the run.
        prior_folder: pipeline that CLIP is taken from.
        decoder_folder: pipeline that MoVQ is taken from, None for the prior.
        aspect_buckets: whether images that are not square are cut to the nearest bucket's shape.
    """
    clip = clip_preprocessing(prior_folder)
    found: dict[str, Any] = {
        "stage": config.stage,
        "image_encoder": _fingerprint(prior_folder, "image_encoder"),
        "clip_size": clip.size,
        "clip_mean": list(clip.mean),
        "clip_std": list(clip.std),
    }
    if decoder_folder is None:
        sources = [CaptionSource.parse(source) for source in config.data.captions]
        return found | {
            "text_encoder": _fingerprint(prior_folder, "text_encoder"),
            "data.captions": [".".join(filter(None, (item.extension, item.field))) for item in sources],
        }
    return found | {
        "movq": _fingerprint(decoder_folder, "movq"),
        "data.resolution": config.data.resolution,
        "data.aspect_buckets": aspect_buckets,
    }


def _fingerprint(folder: Path, component: str) -> str:
    return f"weights {weights_fingerprint(folder, (component,))[:16]}"
