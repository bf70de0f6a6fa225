"""uint8 pixels to what the encoders read, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

MOVQ_STATISTICS = (0.5, 0.5, 0.5)
"""MoVQ reads pixels in [0, 255] / 127.5 - 1."""


@dataclass(frozen=True)
class Normalisation:
    """(pixels / 255 - mean) / std by channel, in fp32, then cast.

    Attributes:
        mean, std: one value a channel, of pixels in [0, 1].
        dtype: what the encoder reads.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: torch.dtype

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to `dtype` of the same shape."""
        mean, std = (
            torch.tensor(values, device=pixels_BCHW.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return ((pixels_BCHW.to(torch.float32) / 255.0 - mean) / std).to(self.dtype)
