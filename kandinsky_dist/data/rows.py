"""A batch that is being put together, row by row: decoded views and a caption of each sample, on the CPU.

Letters of shapes: B samples, L tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kandinsky_dist.data.aspects import view_size
from kandinsky_dist.data.batch import BadSample, Batch, text_length
from kandinsky_dist.data.captions import Captions, dropped
from kandinsky_dist.data.decode import Wanted, decode_views
from kandinsky_dist.data.shard_index import IMAGE_EXTENSIONS
from kandinsky_dist.data.storage import Sample
from kandinsky_dist.errors import SampleError
from kandinsky_dist.runtime.hashing import Stream, uniform

SIZE_MULTIPLE = 64
"""Sides of images that are not square, pixels: MoVQ halves them three times, the U-Net three times more."""

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Views:
    """What an objective wants of a sample; None leaves a part out.

    Attributes:
        clip_size: side of CLIP's view, pixels.
        resolution: side of the decoder's square view, pixels; other aspect buckets have its area.
        tokenize: B captions -> padded ids (B, 77) int64 and mask (B, 77) bool, True on a row's beginning.
        captions: which caption is tokenized.
        caption_dropout: share of captions replaced by "".
        horizontal_flip: share of images that are mirrored.
        random_crop: whether the decoder's view lies anywhere in the image, not in its middle.
        seed: run.seed, of all that is drawn.
    """

    clip_size: int | None
    resolution: int | None
    tokenize: Tokenize | None
    captions: Captions | None
    caption_dropout: float = 0.0
    horizontal_flip: float = 0.0
    random_crop: bool = False
    seed: int

    @property
    def extensions(self) -> frozenset[str]:
        """Members of a sample that are read."""
        has_images = self.clip_size is not None or self.resolution is not None
        captions = self.captions.extensions if self.captions else ()
        return frozenset((*(IMAGE_EXTENSIONS if has_images else ()), *captions))

    def rows(self, positions_B: npt.NDArray[np.int64], aspect: int) -> "Rows":
        """A batch to be put together."""
        return Rows(self, positions_B, aspect)


class Rows:
    """A batch that is being put together: rows in any order and by several threads, then `finish`.

    Args:
        views: what is wanted of each sample.
        positions_B: of the rows in the training stream.
        aspect: bucket of all of them.
    """

    def __init__(self, views: Views, positions_B: npt.NDArray[np.int64], aspect: int) -> None:
        size = None if views.resolution is None else view_size(aspect, views.resolution, SIZE_MULTIPLE)
        clip_size = None if views.clip_size is None else (views.clip_size, views.clip_size)
        self.positions_B = positions_B
        self._views = views
        self._wanted = Wanted(views.clip_size, size)
        self._clip_pixels = _pixels(len(positions_B), clip_size)
        self._pixels = _pixels(len(positions_B), size)
        self._keys = [""] * len(positions_B)
        self._captions = [""] * len(positions_B)

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, row: int, sample: Sample, name: str) -> None:
        """Decodes a sample into its row.

        Raises:
            SampleError: it is damaged or lacks a part; the row can be put again.
        """
        views, position = self._views, int(self.positions_B[row])
        if views.captions is not None:
            self._captions[row] = views.captions.choose(sample.members, position, name)
        if self._clip_pixels is not None or self._pixels is not None:
            crop = None
            if views.random_crop:
                crop = self._draw(Stream.CROP_DOWN, position), self._draw(Stream.CROP_RIGHT, position)
            decode_views(
                _image(sample, name),
                name,
                self._wanted,
                flip=self._draw(Stream.FLIP, position) < views.horizontal_flip,
                crop=crop,
                clip_out=None if self._clip_pixels is None else self._clip_pixels[row],
                out=None if self._pixels is None else self._pixels[row],
            )
        self._keys[row] = sample.key

    def finish(self, bad_samples: Sequence[BadSample]) -> Batch:
        """The batch, every row of which has been put; captions are tokenized together.

        Padding that all rows share is cut off here, where lengths are known without asking a device.
        """
        views = self._views
        token_ids_BL, token_mask_BL = None, None
        if views.tokenize is not None:
            captions = dropped(self._captions, self.positions_B, share=views.caption_dropout, seed=views.seed)
            token_ids_BL, token_mask_BL = _without_shared_padding(*views.tokenize(captions))
        return Batch(
            torch.from_numpy(self.positions_B),
            self._keys,
            None if self._clip_pixels is None else torch.from_numpy(self._clip_pixels),
            None if self._pixels is None else torch.from_numpy(self._pixels),
            token_ids_BL,
            token_mask_BL,
            0 if token_mask_BL is None else int(token_mask_BL.sum()),
            tuple(bad_samples),
        )

    def _draw(self, stream: Stream, position: int) -> float:
        return float(uniform(self._views.seed, stream, position))


def _without_shared_padding(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    length = text_length(int(mask_BL.any(0).sum()), mask_BL.shape[1])
    # Copies: a view would take the whole of what it was cut from along to another process or device.
    return ids_BL[:, :length].clone(), mask_BL[:, :length].clone()


def _image(sample: Sample, name: str) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise SampleError(f"{name}: has no image")


def _pixels(num_samples: int, size: tuple[int, int] | None) -> npt.NDArray[np.uint8] | None:
    return None if size is None else np.empty((num_samples, 3, *size), np.uint8)
