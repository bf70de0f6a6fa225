"""Image bytes -> upright RGB pixels, and from one decoding both views that training wants of an image.

JPEG goes through simplejpeg, all else through Pillow. Both decode JPEG by libjpeg-turbo, to the same bits,
but simplejpeg brings an image to its two views 7 to 21 % sooner (photographs of 640 to 2048 pixels) and
tells when data was damaged, where Pillow fills the rest of the picture with grey.

Arrays: H, W, C height, width and 3 channels.
"""

import io
import re
import warnings
from functools import cache

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
from PIL import Image, UnidentifiedImageError

from kandinsky_dist.data import views
from kandinsky_dist.data.views import Picture, Pixels, Wanted
from kandinsky_dist.errors import SampleError

__all__ = ["MAX_PIXELS", "Wanted", "clip_view", "decode_image", "decode_views", "square_view"]

MAX_PIXELS = 2**27
"""A larger image (134 Mpx; 512 MiB when decoded) is taken for a decompression bomb."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read. Pillow knows more, among it formats for which it starts other programs (EPS: Ghostscript)."""
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
DAMAGE = re.compile(
    "Premature end of JPEG file|premature end of data segment|bad Huffman code|bad arithmetic code|"
    "instead of RST|extraneous bytes before marker 0xd[0-79]"
)
"""Warnings of libjpeg's after which part of the picture is made up; all others concern headers.

Bytes left over before a restart or the end are the usual trace of bits that changed: the decoder fell out of
step (of 400 files with one wrong bit, 118 showed this, 3 any other sign).
"""

# Oddities in metadata are no news, and sizes are judged below. catch_warnings is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_views(
    data: bytes,
    name: str,
    wanted: Wanted,
    *,
    flip: bool = False,
    crop: tuple[float, float] | None = None,
    clip_out: Pixels | None = None,
    out: Pixels | None = None,
) -> tuple[Pixels | None, Pixels | None]:
    """Decodes an image once and takes CLIP's view and the training view of it.

    CLIP's view is the one that CLIPImageProcessor takes; the training view is the largest part of the wanted
    aspect, resized by bicubic. Both are Pillow's within 2 levels (see `views`), unless a JPEG is so large
    that it can be shrunk while it is decoded: `views.denominator` has the rule and what that costs.
    Safe among threads, and made for them: all but 4 to 6 % of the time is spent without the interpreter's
    lock (two threads: 1.92 to 1.99 times the rate of one). Torch may start threads of its own; where several
    decode, give it one (torch.set_num_threads).

    Args:
        data: a file in one of FORMATS.
        name: what to call it in an error.
        wanted: the views.
        flip: mirrors both left-right.
        crop: place of the training view in what is free of the picture, down and to the right, each in
            [0, 1), before the mirror; None for the centre.
        clip_out: uint8 (3, clip_size, clip_size) to write CLIP's view to.
        out: uint8 (3, height, width) to write the training view to.

    Returns:
        CLIP's view and the training view, uint8 (3, height, width), C-contiguous; None where not wanted.

    Raises:
        SampleError: not an image, damaged, or more than MAX_PIXELS; `clip_out` and `out` are untouched.
    """
    if wanted.clip_size is None and wanted.size is None:
        return None, None
    picture = _decoded(data, name, wanted)
    clip, view = None, None
    if wanted.clip_size is not None:
        clip = views.written(views.clip_view(picture, wanted.clip_size), flip=flip, out=clip_out)
    if wanted.size is not None:
        view = views.written(views.training_view(picture, wanted.size, crop), flip=flip, out=out)
    return clip, view


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes the first frame to upright RGB at full size; transparency is composited on white.

    Args:
        data: a file in one of FORMATS.
        name: what to call it in an error.

    Raises:
        SampleError: not an image, damaged, or more than MAX_PIXELS.
    """
    return Image.fromarray(_decoded(data, name, None).pixels_HWC)


def clip_view(image: Image.Image, size: int) -> Pixels:
    """CLIP's view of an RGB image: uint8 (size, size, 3)."""
    return _channels_last(views.clip_view(Picture.of(np.array(image)), size))


def square_view(image: Image.Image, resolution: int) -> Pixels:
    """The largest centre square of an RGB image: uint8 (resolution, resolution, 3)."""
    return _channels_last(views.training_view(Picture.of(np.array(image)), (resolution, resolution)))


def _channels_last(view_CHW: torch.Tensor) -> Pixels:
    return view_CHW.permute(1, 2, 0).contiguous().numpy()


def _decoded(data: bytes, name: str, wanted: Wanted | None) -> Picture:
    """The upright picture, no smaller than what `wanted` needs; None for full size."""
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        if image.width * image.height > MAX_PIXELS:
            raise SampleError(
                f"{name}: {image.width} x {image.height} pixels are more than {MAX_PIXELS}; shrink it"
            )
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            picture = _jpeg(image, data, name, wanted)
            if picture is not None:
                return picture
        image.load()
        # After loading: a PNG may carry it behind the pixels, and TIFF is turned by Pillow as it is loaded.
        return Picture.of(_turned(np.array(_rgb(image)), _orientation(image)))
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(
            f"{name}: cannot be decoded as an image (no known format); replace or drop the sample"
        ) from error
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # the latter under -W error
        raise SampleError(f"{name}: {error}; shrink the image") from error
    # Foreign bytes can make Pillow's many parsers raise nearly anything: all of it means a bad image.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(
            f"{name}: cannot be decoded as an image ({text}); replace or drop the sample"
        ) from error


def _jpeg(image: Image.Image, data: bytes, name: str, wanted: Wanted | None) -> Picture | None:
    """Decodes as small as `wanted` allows, or None where Pillow should try.

    Raises:
        SampleError: part of the picture is missing.
    """
    orientation, height, width = _orientation(image), image.height, image.width
    sideways = orientation >= 5
    upright_height, upright_width = (width, height) if sideways else (height, width)
    shrink = 1 if wanted is None else views.denominator(upright_height, upright_width, wanted)
    # A last row or column that shows part of a pixel must stay last: a rendering is not turned with one.
    while orientation > 1 and (height % shrink or width % shrink):
        shrink //= 2
    try:
        pixels_HWC = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
        )
    except ValueError as error:
        if DAMAGE.search(str(error)):
            raise SampleError(
                f"{name}: cannot be decoded as an image ({error}); replace or drop the sample"
            ) from error
        return None
    return Picture(_turned(pixels_HWC, orientation), upright_height, upright_width, shrink)


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1
    return orientation if orientation in UPRIGHT else 1


def _turned(pixels_HWC: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels_HWC
    return np.ascontiguousarray(UPRIGHT[orientation](pixels_HWC))


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; embedded profiles are not applied, and CMYK in JPEG is taken as Adobe stores it, inverted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
