"""A micro-batch, and what is said of samples that had to be replaced in it.

Letters of shapes: B samples, C channels, H and W sides of pixels or latents, L tokens of the longest
caption, rounded up, D widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TEXT_MULTIPLE = 8
"""Texts are padded to multiples of so many tokens: each length is another shape to compile and allocate."""


@dataclass(frozen=True)
class BadSample:
    """A damaged sample of the stream, by its shard and key, and the one trained on in its place."""

    position: int
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch; a part that was not asked for is None.

    Attributes:
        clip_pixels_BCHW, pixels_BCHW: uint8.
        token_mask_BL: which tokens, or text states, are a caption's: the first ones.
        num_text_tokens: how many are, in all captions; known here without asking a device.
        image_embeds_BD, text_embeds_BD, text_states_BLD, latents_BCHW: encoder outputs that were computed in
            advance, in the type in which they are kept; zeros behind the states of a shorter caption.
    """

    positions_B: Tensor
    keys: Sequence[str]
    clip_pixels_BCHW: Tensor | None
    pixels_BCHW: Tensor | None
    token_ids_BL: Tensor | None
    token_mask_BL: Tensor | None
    num_text_tokens: int = 0
    bad_samples: tuple[BadSample, ...] = ()
    image_embeds_BD: Tensor | None = None
    text_embeds_BD: Tensor | None = None
    text_states_BLD: Tensor | None = None
    latents_BCHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def text_length(self) -> int:
        """L, known from the shape alone; 0 where there is no text."""
        return 0 if self.token_mask_BL is None else self.token_mask_BL.shape[1]

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


def text_length(longest: int, maximum: int) -> int:
    """Tokens that texts are padded to, the longest of which has `longest`."""
    return min(maximum, max(1, -(-longest // TEXT_MULTIPLE)) * TEXT_MULTIPLE)
