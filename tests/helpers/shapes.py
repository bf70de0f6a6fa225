"""Pipeline folders with configurations and no weights: all that an estimate looks at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kandinsky_dist.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, Stage
from kandinsky_dist.models.architectures import Size, architecture

NAMES = {
    "prior": {"prior": "prior", "text_encoder": "text_encoder", "image_encoder": "image_encoder"},
    "decoder": {"unet": "unet", "movq": "movq"},
}


def write_shapes(folder: Path, size: Size) -> Path:
    """FOLDER/prior and FOLDER/decoder."""
    shapes = architecture(size)
    for pipeline, networks in NAMES.items():
        for component, name in networks.items():
            path = folder / pipeline / component / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(getattr(shapes, name)))
    return folder


def config_of(folder: Path, stage: Stage, **parallel: Any) -> Config:
    """A configuration on such folders: micro-batches of 4, 128 pixels.

    At 64 pixels the U-Net's innermost maps are single pixels, whose memory format is anybody's guess.
    """
    config = Config(
        stage=stage,
        model=ModelConfig(prior=str(folder / "prior"), decoder=str(folder / "decoder")),
        data=DataConfig(global_batch_size=64, micro_batch_size=4, resolution=128),
    )
    return replace(config, parallel=ParallelConfig(**parallel))
