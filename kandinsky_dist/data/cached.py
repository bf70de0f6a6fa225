"""Batches of encoder outputs that were computed in advance.

Letters of shapes: B samples, F 1 or 2 views (as it is, mirrored), L text states, D widths, C, H, W latents.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.batch import Batch, text_length
from kandinsky_dist.data.cache_description import MAX_TEXT_STATES, CacheDescription
from kandinsky_dist.data.captions import caption_drops
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.records import RecordBatch, RecordReader
from kandinsky_dist.runtime.hashing import Stream, uniform


class CachedDataset:
    """What a run is trained on without its encoders: which samples, seen how.

    Dropout and mirroring fall on the same positions as where images and captions are read.

    Args:
        order: of the corpora, whose records are alike.
        description: of all of them.
        caption_dropout: share of captions replaced by "".
        horizontal_flip: share of images that are mirrored.
        seed: run.seed.
        pin_memory: whether batches lie in page-locked memory.
    """

    in_process = True

    def __init__(
        self,
        order: Order,
        description: CacheDescription,
        *,
        caption_dropout: float = 0.0,
        horizontal_flip: float = 0.0,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        self.order = order
        self._reader = RecordReader(order, description.layouts())
        self._constants = description.constants
        self._caption_dropout = caption_dropout
        self._horizontal_flip = horizontal_flip
        self._seed = seed
        self._pin_memory = pin_memory

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.order.num_samples

    def batches(self, lists: Iterable[Sequence[int]], num_threads: int) -> Generator[Batch, None, None]:
        """Batches of some lists of positions; see `RecordReader.batches`."""
        for records in self._reader.batches(lists, num_threads=num_threads, pin_memory=self._pin_memory):
            yield self._batch(records)

    def _batch(self, records: RecordBatch) -> Batch:
        tensors = records.tensors
        text: dict[str, Tensor | None] = {"token_mask_BL": None}
        if "text_states" in tensors:
            text = dict(self._text(records))
        return Batch(
            torch.from_numpy(records.positions_B),
            records.keys(),
            clip_pixels_BCHW=None,
            pixels_BCHW=None,
            token_ids_BL=None,
            bad_samples=records.bad_samples,
            image_embeds_BD=self._view(tensors["image_embeds"], records.positions_B),
            latents_BCHW=self._view(tensors["latents"], records.positions_B)
            if "latents" in tensors
            else None,
            **text,
        )

    def _view(self, views_BF: Tensor, positions_B: np.ndarray) -> Tensor:
        """Of each sample, what was computed of its image as it is or mirrored."""
        if views_BF.shape[1] == 1:
            return views_BF[:, 0]
        flips_B = uniform(self._seed, Stream.FLIP, positions_B) < self._horizontal_flip
        return views_BF[torch.arange(len(views_BF)), torch.from_numpy(flips_B.astype(np.int64))]

    def _text(self, records: RecordBatch) -> Mapping[str, Tensor]:
        """The captions' states, and the empty caption's where dropout asks for it."""
        embeds_BD, states_BLD = records.tensors["text_embeds"], records.tensors["text_states"]
        lengths_B = torch.from_numpy(records.num_rows_B.copy())
        drops_B = torch.from_numpy(
            caption_drops(records.positions_B, share=self._caption_dropout, seed=self._seed)
        )
        empty_LD = self._constants["text_states"]
        lengths_B[drops_B] = len(empty_LD)
        length = text_length(int(lengths_B.max()), MAX_TEXT_STATES)
        states_BLD = _of_length(states_BLD, length)
        if drops_B.any():
            embeds_BD[drops_B] = self._constants["text_embeds"]
            states_BLD[drops_B] = _of_length(empty_LD[None], length)
        return {
            "text_embeds_BD": embeds_BD,
            "text_states_BLD": states_BLD,
            "token_mask_BL": torch.arange(states_BLD.shape[1]) < lengths_B[:, None],
        }


def blank_batch(description: CacheDescription, num_text_states: int, device: torch.device) -> Batch:
    """A batch of one sample of zeros."""
    (layout, *_), aspect = description.layouts().values(), WHOLE
    is_prior = description.settings["stage"] == "prior"

    def zeros(*shape: int, dtype: torch.dtype = layout.dtype) -> Tensor:
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    widths = description.widths
    return Batch(
        positions_B=zeros(dtype=torch.int64),
        keys=[""],
        clip_pixels_BCHW=None,
        pixels_BCHW=None,
        token_ids_BL=None,
        token_mask_BL=zeros(num_text_states, dtype=torch.bool) if is_prior else None,
        image_embeds_BD=zeros(widths["image_embeds"]),
        text_embeds_BD=zeros(widths["text_embeds"]) if is_prior else None,
        text_states_BLD=zeros(num_text_states, widths["text_states"]) if is_prior else None,
        latents_BCHW=None if is_prior else zeros(*description.latent_shape(aspect)),
    )


def _of_length(states_BLD: Tensor, length: int) -> Tensor:
    """Text states cut or continued with zeros."""
    if length <= states_BLD.shape[1]:
        return states_BLD[:, :length].contiguous()
    return torch.nn.functional.pad(states_BLD, (0, 0, 0, length - states_BLD.shape[1]))
