"""Batches of encoder outputs that were computed in advance.

Letters of shapes: B samples, F 1 or 2 views (as it is, mirrored), L text states, D widths, C, H, W latents.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kandinsky_dist.data.batch import BadSample, Batch, text_length
from kandinsky_dist.data.cache_description import MAX_TEXT_STATES, CacheDescription
from kandinsky_dist.data.captions import caption_drops
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.record_layout import Sheet
from kandinsky_dist.data.record_slots import MISSING
from kandinsky_dist.data.records import RECORD_EXTENSION, RecordReader, seal_problem, size_problem
from kandinsky_dist.data.storage import Sample
from kandinsky_dist.errors import SampleError
from kandinsky_dist.runtime.hashing import Stream, uniform

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CachedViews:
    """What an objective wants of a sample's record.

    Dropout and mirroring fall on the same positions as where images and captions are read.

    Attributes:
        description: of the records.
        caption_dropout: share of captions replaced by "".
        horizontal_flip: share of images that are mirrored.
        seed: run.seed.
    """

    description: CacheDescription
    caption_dropout: float = 0.0
    horizontal_flip: float = 0.0
    seed: int

    @property
    def extensions(self) -> frozenset[str]:
        """Members of a sample that are read."""
        return frozenset((RECORD_EXTENSION,))

    def rows(self, positions_B: Int64s, aspect: int) -> "CachedRows":
        """A batch to be put together from records that come as bytes."""
        return CachedRows(self, positions_B, aspect)

    def batch(
        self,
        positions_B: Int64s,
        keys: Sequence[str],
        tensors: Mapping[str, Tensor],
        num_rows_B: Int64s,
        bad_samples: Sequence[BadSample],
    ) -> Batch:
        """The batch that some records make, whose tensors it may change."""
        text: dict[str, Any] = {"token_mask_BL": None}
        if "text_states" in tensors:
            text = self._text(positions_B, tensors["text_embeds"], tensors["text_states"], num_rows_B)
        return Batch(
            torch.from_numpy(positions_B),
            keys,
            clip_pixels_BCHW=None,
            pixels_BCHW=None,
            token_ids_BL=None,
            bad_samples=tuple(bad_samples),
            image_embeds_BD=self._view(tensors["image_embeds"], positions_B),
            latents_BCHW=self._view(tensors["latents"], positions_B) if "latents" in tensors else None,
            **text,
        )

    def _view(self, views_BF: Tensor, positions_B: Int64s) -> Tensor:
        """Of each sample, what was computed of its image as it is or mirrored."""
        if views_BF.shape[1] == 1:
            return views_BF[:, 0]
        flips_B = uniform(self.seed, Stream.FLIP, positions_B) < self.horizontal_flip
        return views_BF[torch.arange(len(views_BF)), torch.from_numpy(flips_B.astype(np.int64))]

    def _text(
        self, positions_B: Int64s, embeds_BD: Tensor, states_BLD: Tensor, num_states_B: Int64s
    ) -> dict[str, Any]:
        """The captions' states, and the empty caption's where dropout asks for it."""
        lengths_B = torch.from_numpy(num_states_B.copy())
        drops_B = torch.from_numpy(caption_drops(positions_B, share=self.caption_dropout, seed=self.seed))
        empty_LD = self.description.constants["text_states"]
        lengths_B[drops_B] = len(empty_LD)
        length = text_length(int(lengths_B.max()), MAX_TEXT_STATES)
        states_BLD = _of_length(states_BLD, length)
        if drops_B.any():
            embeds_BD[drops_B] = self.description.constants["text_embeds"]
            states_BLD[drops_B] = _of_length(empty_LD[None], length)
        return {
            "text_embeds_BD": embeds_BD,
            "text_states_BLD": states_BLD,
            "token_mask_BL": torch.arange(states_BLD.shape[1]) < lengths_B[:, None],
            "num_text_tokens": int(lengths_B.sum()),
        }


class CachedDataset:
    """What a run is trained on without its encoders, from shards on a file system.

    Args:
        order: of the corpora, whose records are alike.
        views: what is wanted of them.
        pin_memory: whether batches lie in page-locked memory.
    """

    in_process = True

    def __init__(self, order: Order, views: CachedViews, *, pin_memory: bool = False) -> None:
        self.order = order
        self.views = views
        self._reader = RecordReader(order, views.description.layouts())
        self._pin_memory = pin_memory

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.order.num_samples

    def num_text_states(self, positions_B: Int64s) -> Int64s:
        """How many there are at some positions, dropout included; damaged samples count as 0."""
        drops_B = caption_drops(positions_B, share=self.views.caption_dropout, seed=self.views.seed)
        empty = len(self.views.description.constants["text_states"])
        return np.where(drops_B, empty, self._reader.num_rows(positions_B))

    def batches(self, lists: Iterable[Sequence[int]], num_threads: int) -> Generator[Batch, None, None]:
        """Batches of some lists of positions; see `RecordReader.batches`."""
        for records in self._reader.batches(lists, num_threads=num_threads, pin_memory=self._pin_memory):
            yield self.views.batch(
                records.positions_B, records.keys(), records.tensors, records.num_rows_B, records.bad_samples
            )


class CachedRows:
    """A batch that is put together from records that come as bytes, over the network; see `dataset.Rows`."""

    def __init__(self, views: CachedViews, positions_B: Int64s, aspect: int) -> None:
        self.positions_B = positions_B
        self._views = views
        self._layout = views.description.layouts()[aspect]
        self._keys = [""] * len(positions_B)
        self._records = [b""] * len(positions_B)

    def put(self, row: int, sample: Sample, name: str) -> None:
        """Takes a sample's record.

        Raises:
            SampleError: it has none, or one that is damaged.
        """
        record = sample.members.get(RECORD_EXTENSION)
        size = MISSING if record is None else len(record)
        num_rows = int(self._layout.num_rows(np.array([size]))[0])
        if record is None or num_rows < 0:
            raise SampleError(size_problem(name, size, self._layout))
        sheet = Sheet(self._layout, np.array([num_rows]))
        sheet.fill([record])
        sheet.add_up(0, 1)
        if sheet.broken_seals():
            raise SampleError(seal_problem(name))
        self._keys[row], self._records[row] = sample.key, record

    def finish(self, bad_samples: Sequence[BadSample]) -> Batch:
        """The batch, every row of which has been put."""
        sizes_B = np.array([len(record) for record in self._records])
        sheet = Sheet(self._layout, self._layout.num_rows(sizes_B))
        sheet.fill(self._records)
        return self._views.batch(self.positions_B, self._keys, sheet.tensors, sheet.num_rows_B, bad_samples)


def blank_batch(description: CacheDescription, num_text_states: int, device: torch.device) -> Batch:
    """A batch of one sample of zeros."""
    dtype = next(iter(description.layouts().values())).dtype
    widths, is_prior = description.widths, description.settings["stage"] == "prior"

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    return Batch(
        positions_B=zeros(dtype=torch.int64),
        keys=[""],
        clip_pixels_BCHW=None,
        pixels_BCHW=None,
        token_ids_BL=None,
        token_mask_BL=zeros(num_text_states, dtype=torch.bool) if is_prior else None,
        num_text_tokens=num_text_states if is_prior else 0,
        image_embeds_BD=zeros(widths["image_embeds"]),
        text_embeds_BD=zeros(widths["text_embeds"]) if is_prior else None,
        text_states_BLD=zeros(num_text_states, widths["text_states"]) if is_prior else None,
        latents_BCHW=None if is_prior else zeros(*description.latent_shape()),
    )


def _of_length(states_BLD: Tensor, length: int) -> Tensor:
    """Text states cut or continued with zeros."""
    if length <= states_BLD.shape[1]:
        return states_BLD[:, :length].contiguous()
    return torch.nn.functional.pad(states_BLD, (0, 0, 0, length - states_BLD.shape[1]))
