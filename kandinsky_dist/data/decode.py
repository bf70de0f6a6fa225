"""Image bytes -> one RGB image -> the views that the encoders want, uint8 until the device.

Arrays: H, W, C height, width and 3 channels.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from kandinsky_dist.errors import DataError

MAX_PIXELS = 2**27
"""A larger image (134 Mpx; 512 MiB when decoded) is taken for a decompression bomb."""
EXIF_ORIENTATION = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_WHOLE_RESIZE_ASPECT = 16
"""Beyond this aspect ratio only the part that the crop keeps is resized: the rest could fill memory."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes the first frame to upright RGB; transparency is composited on white.

    Args:
        data: a file in any format that Pillow reads.
        name: what to call it in an error.

    Raises:
        DataError: not an image, damaged, or more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless oddities in metadata; bombs are refused below
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: {image.width} x {image.height} pixels are more than {MAX_PIXELS}; shrink it"
                )
            image.load()
            return _to_rgb(_upright(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: cannot be decoded as an image (no known format); replace or drop the sample"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}; shrink the image") from error
    # Foreign bytes can make Pillow's many parsers raise nearly anything: all of it means a bad image.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: cannot be decoded as an image ({text}); replace or drop the sample"
        ) from error


def clip_view(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """What CLIPImageProcessor feeds to the encoder, before normalisation.

    Shortest edge to `size` by bicubic, then the centre square.

    Args:
        image: RGB.
        size: side in pixels.

    Returns:
        uint8 (size, size, 3), equal to transformers' PIL processor.

    Source: transformers 5, image_transforms.get_resize_output_image_size and center_crop.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > MAX_WHOLE_RESIZE_ASPECT * short:
        middle = (long - short) / 2
        box = (middle, 0, middle + short, short) if width > height else (0, middle, short, middle + short)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    new_long = int(size * long / short)
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def square_view(image: Image.Image, resolution: int) -> npt.NDArray[np.uint8]:
    """The largest centre square, by bicubic to resolution x resolution.

    Args:
        image: RGB.
        resolution: side in pixels.

    Returns:
        uint8 (resolution, resolution, 3).
    """
    width, height = image.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return image
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def _to_rgb(image: Image.Image) -> Image.Image:
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
