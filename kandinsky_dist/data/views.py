"""Pixels -> the views that training wants of an image: which part, how large, resized how.

Arrays: H, W, C height, width and 3 channels. All pixels are uint8.

Resizing is torch's antialiased bicubic on uint8: across, then down, with weights of 16 bits. Of
photographs, fewer than 1 value in 100 differs from Pillow's bicubic, and by at most 2 levels. That holds
for any picture against Pillow's passes in the same order; Pillow itself may start with the other one, which
shows where hard edges between extremes overshoot and are clipped. It is 5 to 7 times as fast (1024 -> 512
pixels: 1.2 against 8 ms, one core of an EPYC 9005), and resizing was most of what an image cost.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

Pixels = npt.NDArray[np.uint8]

TRAINING_COVER = 1
"""A picture decoded smaller must keep this many times the training view's sides: see `denominator`."""
CLIP_COVER = 2
"""The same for CLIP's view, which a frozen encoder reads that knows bicubic pictures only."""
MAX_WHOLE_RESIZE_ASPECT = 16
"""Beyond this aspect ratio CLIP's view is that of the middle part: the rest could fill memory."""


@dataclass(frozen=True)
class Wanted:
    """The views to make of an image.

    Attributes:
        clip_size: side of CLIP's view in pixels, or None for no such view.
        size: height and width of the training view in pixels, or None.
    """

    clip_size: int | None
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Picture:
    """An upright picture, or a smaller rendering of it.

    Attributes:
        pixels_HWC: 1/denominator as high and wide as the picture, rounded up.
        height: of the picture itself.
        width: of the picture itself.
        denominator: 1, 2, 4 or 8.
    """

    pixels_HWC: Pixels
    height: int
    width: int
    denominator: int = 1

    @classmethod
    def of(cls, pixels_HWC: Pixels) -> "Picture":
        """A picture at its own size."""
        return cls(pixels_HWC, *pixels_HWC.shape[:2])


def denominator(height: int, width: int, wanted: Wanted) -> int:
    """By how much a picture may be shrunk while it is decoded: 1, 2, 4 or 8.

    The largest for which the part that each view shows still has the view's sides, times TRAINING_COVER or
    CLIP_COVER. JPEG shrinks by dropping frequencies of its 8 x 8 blocks, which saves time but is no bicubic.
    Against bicubic of the full picture, on the sharpest photograph tried (mean and 99th percentile of the
    levels between them, and PSNR): 3.0, 20, 34 dB where nothing is left to resize, 1.6, 10, 39 dB at 1.5
    times the sides, 1.0, 6, 44 dB at twice the sides. For scale: Lanczos and bicubic are 1.1, 7, 42 dB
    apart, Hamming and bicubic 1.7, 12, 38 dB; held to an ideal low-pass filter, it does as well as averaging
    of areas. Other eighths (3/8, 5/8 ...) take longer than the full picture: libjpeg-turbo has fast code for
    halves only.
    """
    for candidate in (8, 4, 2):
        if _covers(height // candidate, width // candidate, wanted):
            return candidate
    return 1


def _covers(height: int, width: int, wanted: Wanted) -> bool:
    if wanted.clip_size is not None and min(height, width) < CLIP_COVER * wanted.clip_size:
        return False
    if wanted.size is None:
        return True
    if not height or not width:
        return False
    crop_height, crop_width = _largest_crop(height, width, wanted.size)
    return crop_height >= TRAINING_COVER * wanted.size[0] and crop_width >= TRAINING_COVER * wanted.size[1]


def clip_view(picture: Picture, size: int) -> torch.Tensor:
    """What CLIPImageProcessor feeds to the encoder, before normalisation: uint8 (3, size, size).

    Shortest edge to `size` by bicubic, then the centre square.

    Source: transformers 5, image_transforms.get_resize_output_image_size and center_crop.
    """
    pixels, height, width = picture.pixels_HWC, picture.height, picture.width
    shrunk = picture.denominator
    if max(height, width) > MAX_WHOLE_RESIZE_ASPECT * min(height, width):
        pixels = _middle(pixels)
        (height, width), shrunk = pixels.shape[:2], 1
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    new_height, new_width = (new_long, size) if width <= height else (size, new_long)
    resized_CHW = _resized(pixels, new_height, new_width, height / shrunk, width / shrunk)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return resized_CHW[:, top : top + size, left : left + size]


def training_view(
    picture: Picture, size: tuple[int, int], crop: tuple[float, float] | None = None
) -> torch.Tensor:
    """The largest part of the wanted aspect, by bicubic to `size`: uint8 (3, height, width).

    Of a smaller rendering, the part's sides and place are whole pixels of the rendering.

    Args:
        picture: to take it from.
        size: height and width in pixels.
        crop: where the part lies in what is free, down and to the right, each in [0, 1); None for the centre.
    """
    pixels = picture.pixels_HWC
    height, width = picture.height // picture.denominator, picture.width // picture.denominator
    part_height, part_width = _largest_crop(height, width, size)
    places = (0.5, 0.5) if crop is None else crop
    top, left = (
        free // 2 if crop is None else min(free, int(place * (free + 1)))
        for free, place in zip((height - part_height, width - part_width), places, strict=True)
    )
    # numpy copies strided rows faster than torch does inside interpolate.
    part = np.ascontiguousarray(pixels[top : top + part_height, left : left + part_width])
    return _resized(part, *size, part_height, part_width)


def written(view_CHW: torch.Tensor, *, flip: bool, out: Pixels | None) -> Pixels:
    """The view as a C-contiguous array, mirrored left-right if asked, in `out` where one is given."""
    if flip:
        view_CHW = view_CHW.flip(-1)
    if out is None:
        return view_CHW.contiguous().numpy()
    assert out.shape == tuple(view_CHW.shape), f"out is {out.shape}, the view {tuple(view_CHW.shape)}"
    np.copyto(out, view_CHW.numpy())
    return out


def _largest_crop(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    if width * size[0] >= height * size[1]:
        return height, max(1, round(height * size[1] / size[0]))
    return max(1, round(width * size[0] / size[1])), width


def _middle(pixels_HWC: Pixels) -> Pixels:
    """The middle of a ribbon, MAX_WHOLE_RESIZE_ASPECT times as long as it is broad."""
    num = MAX_WHOLE_RESIZE_ASPECT * min(pixels_HWC.shape[:2])
    top, left = (max(0, side - num) // 2 for side in pixels_HWC.shape[:2])
    return np.ascontiguousarray(pixels_HWC[top : top + num, left : left + num])


def _resized(
    pixels_HWC: Pixels, height: int, width: int, covered_height: float, covered_width: float
) -> torch.Tensor:
    """Bicubic of the first covered_height x covered_width pixels, which may be fractions: uint8 (3, H, W)."""
    pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    if (covered_height, covered_width) == tuple(pixels_HWC.shape[:2]):
        if (height, width) == (covered_height, covered_width):
            return pixels_BCHW[0]
        size, scales = (height, width), None
    else:
        # The last row and column of a rendering may hold only part of a pixel: to stretch them to a whole one
        # would move the picture by half a pixel. Raised a little, so that rounding down never loses a row.
        size, scales = None, (height / covered_height * (1 + 1e-9), width / covered_width * (1 + 1e-9))
    resized_BCHW = interpolate(pixels_BCHW, size=size, scale_factor=scales, mode="bicubic", antialias=True)
    return resized_BCHW[0, :, :height, :width]
