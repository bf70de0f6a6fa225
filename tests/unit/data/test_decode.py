import io
import warnings

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kandinsky_dist.data.decode import clip_view, decode_image, square_view
from kandinsky_dist.errors import DataError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, channels=3, seed=0):
    """Smooth enough for a resize to matter, sharp enough for rounding to show."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (max(1, height // 3), max(1, width // 3), channels), np.uint8)
    return np.asarray(Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BILINEAR))


SHAPES = [
    (224, 224),
    (300, 200),
    (200, 300),
    (225, 337),
    (641, 480),
    (31, 17),
    (97, 500),
    (1000, 63),
    (224, 225),
]


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("size", [224, 33])
def test_clip_view_equals_the_processor(width, height, size):
    image = Image.fromarray(noise(width, height))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    view = clip_view(image, size)
    assert view.dtype == np.uint8
    np.testing.assert_array_equal(view, expected)


def test_clip_view_of_a_ribbon_needs_no_ribbon_of_memory():
    image = Image.fromarray(noise(20_000, 40))
    view = clip_view(image, 64)
    whole = image.resize((32_000, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 15_968 : 15_968 + 64].astype(int)
    assert np.abs(view - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 61), (61, 100), (7, 7), (65, 64)])
def test_square_view(width, height):
    pixels = noise(width, height)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    expected = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(square_view(Image.fromarray(pixels), 48), expected)


def decoded(data):
    image = decode_image(data, "a.tar:key")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_alpha_is_composited_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)]
    result = decoded(encoded(Image.fromarray(pixels)))
    np.testing.assert_array_equal(result[0, :2], [(200, 0, 0), (255, 255, 255)])
    np.testing.assert_allclose(result[0, 2], (227, 127, 127), atol=1)
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(decoded(encoded(grey)), [[(10,) * 3, (255,) * 3]])


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    np.testing.assert_array_equal(decoded(encoded(image)), [[(255, 0, 0), (0, 255, 0)]])
    np.testing.assert_array_equal(decoded(encoded(image, transparency=1)), [[(255, 0, 0), (255, 255, 255)]])
    np.testing.assert_array_equal(
        decoded(encoded(image, transparency=bytes([255, 0]))), [[(255, 0, 0), (255, 255, 255)]]
    )
    rgb = Image.fromarray(np.array([[(1, 2, 3), (4, 5, 6)]], np.uint8))
    np.testing.assert_array_equal(decoded(encoded(rgb, transparency=(1, 2, 3))), [[(255,) * 3, (4, 5, 6)]])


def test_grey_bilevel_deep_and_cmyk():
    grey = noise(20, 10, 1)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(grey > 99)))[..., 0], (grey > 99) * 255)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(encoded(deep)), np.stack([grey] * 3, axis=-1))
    rgb = Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8))
    result = decoded(encoded(rgb.convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(result[8, 8], (200, 100, 50), atol=4)


def test_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decoded(data)[0, 0], (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Stored as the camera held it, decoded as the photographer saw it."""
    seen = noise(24, 16)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(undo(seen))), exif=exif)
    np.testing.assert_array_equal(decoded(data), seen)


def test_damaged_metadata_does_not_lose_the_picture():
    pixels = noise(16, 16)
    data = encoded(Image.fromarray(pixels), exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    np.testing.assert_array_equal(decoded(data), pixels)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(Image.fromarray(noise(64, 64)), "JPEG")[:500],
        encoded(Image.fromarray(noise(64, 64)))[:90],
    ],
)
def test_damaged_images_are_one_line(data):
    with pytest.raises(DataError, match=r"^a\.tar:key: cannot be decoded as an image") as caught:
        decode_image(data, "a.tar:key")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_decompression_bombs_are_refused_undecoded(side):
    """A bilevel image is a few kilobytes in the file and gigabytes in memory."""
    data = encoded(Image.new("1", (side, side)), "PNG")
    assert len(data) < 60_000
    with pytest.raises(DataError, match=r"^a\.tar:key: .*pixels.*shrink"):
        decode_image(data, "a.tar:key")


def test_decode_leaves_the_callers_warnings_alone():
    before = list(warnings.filters)
    decode_image(encoded(Image.new("RGB", (2, 2))), "x")
    assert list(warnings.filters) == before
