"""Pipeline folders with configurations and no weights: all that an estimate looks at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kandinsky_dist.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, Stage
from kandinsky_dist.models.architectures import Architecture, architecture

NAMES = {
    "prior": {"prior": "prior", "text_encoder": "text_encoder", "image_encoder": "image_encoder"},
    "decoder": {"unet": "unet", "movq": "movq"},
}


def least() -> Architecture:
    """Return the tiny shapes with as few layers as have every kind of block."""
    shapes = architecture("tiny")
    down, up = shapes.unet["down_block_types"], shapes.unet["up_block_types"]
    shapes.prior["num_layers"] = 2
    shapes.unet.update(block_out_channels=[32, 64], down_block_types=down[:2], up_block_types=up[-2:])
    return shapes


def write_shapes(folder: Path, shapes: Architecture) -> Path:
    """FOLDER/prior and FOLDER/decoder."""
    for pipeline, networks in NAMES.items():
        for component, name in networks.items():
            path = folder / pipeline / component / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(getattr(shapes, name)))
    return folder


def config_of(folder: Path, stage: Stage, **parallel: Any) -> Config:
    """A configuration on such folders: micro-batches of 4, 64 pixels.

    Of the tiny U-Net, not of the least one, the innermost maps are then single pixels, whose memory format is
    undefined.
    """
    config = Config(
        stage=stage,
        model=ModelConfig(prior=str(folder / "prior"), decoder=str(folder / "decoder")),
        data=DataConfig(global_batch_size=64, micro_batch_size=4, resolution=64),
    )
    return replace(config, parallel=ParallelConfig(**parallel))
