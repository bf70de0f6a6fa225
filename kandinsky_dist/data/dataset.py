"""From positions to a batch of views and tokens, on the CPU.

Letters of shapes: B samples, C 3 channels, H and W pixels, L tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kandinsky_dist.data.decode import clip_view, decode_image, square_view
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.plan import Plan
from kandinsky_dist.data.shard_index import CAPTION_EXTENSION, IMAGE_EXTENSIONS
from kandinsky_dist.data.storage import Sample, Storage
from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime import hashing

WANTED_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, CAPTION_EXTENSION))


@dataclass(frozen=True)
class Views:
    """What an objective wants of a sample; None leaves a part out.

    Attributes:
        clip_size: side of CLIP's view, pixels.
        resolution: side of the decoder's square view, pixels.
        tokenize: B captions -> ids (B, L) int64 and mask (B, L) bool.
        caption_dropout: share of captions replaced by "".
        seed: run.seed, of the dropout.
    """

    clip_size: int | None
    resolution: int | None
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]] | None
    caption_dropout: float
    seed: int


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch; a part that was not asked for is None."""

    positions_B: Tensor
    keys: list[str]
    clip_pixels_BCHW: Tensor | None
    pixels_BCHW: Tensor | None
    token_ids_BL: Tensor | None
    token_mask_BL: Tensor | None

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to the device run on their own."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def tensors(self) -> list[Tensor]:
        """All tensors that it has."""
        return [
            value
            for value in (getattr(self, item.name) for item in fields(self))
            if isinstance(value, Tensor)
        ]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            item.name: function(value)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **changed)


class ShardDataset(Dataset):
    """Map-style dataset whose index is a position of the training stream."""

    def __init__(self, manifest: Manifest, plan: Plan, views: Views, storage: Storage) -> None:
        assert plan.num_samples == manifest.num_samples
        self.manifest = manifest
        self.plan = plan
        self.views = views
        self.storage = storage

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, position: int) -> Batch:
        """The batch of one sample."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Reads, decodes and tokenizes the samples at some positions.

        Raises:
            DataError: a sample that cannot be read or decoded, by shard and key.
        """
        views = self.views
        num_samples = len(positions)
        positions_B = np.asarray(positions, np.int64)
        keys, captions = [], []
        clip_pixels = _empty_images(num_samples, views.clip_size)
        pixels = _empty_images(num_samples, views.resolution)
        for row, (shard, index) in enumerate(zip(*self.plan.locate(positions_B), strict=True)):
            sample = self.storage.read(int(shard), int(index), WANTED_EXTENSIONS)
            name = f"{self.manifest.shards[shard].path}:{sample.key}"
            keys.append(sample.key)
            if views.tokenize is not None:
                captions.append(_caption(sample, name))
            if views.clip_size is None and views.resolution is None:
                continue
            image = decode_image(_image_bytes(sample, name), name)
            if clip_pixels is not None and views.clip_size is not None:
                clip_pixels[row] = clip_view(image, views.clip_size).transpose(2, 0, 1)
            if pixels is not None and views.resolution is not None:
                pixels[row] = square_view(image, views.resolution).transpose(2, 0, 1)
        token_ids_BL, token_mask_BL = None, None
        if views.tokenize is not None:
            token_ids_BL, token_mask_BL = views.tokenize(self._dropped(captions, positions_B))
        return Batch(
            torch.from_numpy(positions_B),
            keys,
            None if clip_pixels is None else torch.from_numpy(clip_pixels),
            None if pixels is None else torch.from_numpy(pixels),
            token_ids_BL,
            token_mask_BL,
        )

    def _dropped(self, captions: list[str], positions_B: np.ndarray) -> list[str]:
        """Captions of which a share, chosen by position alone, is replaced by ""."""
        draws = hashing.uniform(self.views.seed, hashing.Stream.CAPTION_DROPOUT, positions_B)
        drops = draws < self.views.caption_dropout
        return ["" if drop else caption for drop, caption in zip(drops, captions, strict=True)]


def _empty_images(num_samples: int, side: int | None) -> np.ndarray | None:
    return None if side is None else np.empty((num_samples, 3, side, side), np.uint8)


def _image_bytes(sample: Sample, name: str) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise DataError(f"{name}: has no image; index the shards again")


def _caption(sample: Sample, name: str) -> str:
    try:
        return sample.members[CAPTION_EXTENSION].decode("utf-8").strip()
    except KeyError:
        raise DataError(f"{name}: has no caption; index the shards again") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: its .{CAPTION_EXTENSION} is not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
