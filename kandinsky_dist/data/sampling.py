"""A look at a corpus without training on it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kandinsky_dist.data.dataset import ShardDataset, Views
from kandinsky_dist.data.manifest import read_manifest
from kandinsky_dist.data.plan import Plan
from kandinsky_dist.data.storage import LocalStorage


def first_pictures(shards: str, *, num_samples: int, side: int, batch_size: int) -> Iterator[Tensor]:
    """CLIP's view of a fixed random subset: the first samples that a run with seed 0 would see.

    Args:
        shards: as data.shards.
        num_samples: at most; a smaller corpus is given once.
        side: of the views, pixels.
        batch_size: samples a tensor; the last one may be shorter.

    Yields:
        uint8 (B, 3, side, side).
    """
    manifest = read_manifest(shards)
    views = Views(clip_size=side, resolution=None, tokenize=None, caption_dropout=0.0, seed=0)
    plan = Plan(manifest.shard_sizes, seed=0)
    dataset = ShardDataset(manifest, plan, views, LocalStorage(manifest))
    positions = np.arange(min(num_samples, plan.num_samples))
    for first in range(0, len(positions), batch_size):
        clip_pixels_BCHW = dataset.__getitems__(
            positions[first : first + batch_size].tolist()
        ).clip_pixels_BCHW
        assert isinstance(clip_pixels_BCHW, torch.Tensor)
        yield clip_pixels_BCHW
