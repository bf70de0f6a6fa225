import functools
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import simplejpeg
from helpers.campaign import cases, examples, pairwise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kandinsky_dist.data.decode import Wanted, clip_view, decode_image, decode_views, square_view
from kandinsky_dist.data.views import denominator
from kandinsky_dist.errors import SampleError

RESIZE_LEVELS = 2
"""How far torch's bicubic may be from Pillow's, across first and then down."""


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, channels=3, seed=0):
    """Smooth enough for a resize to matter, sharp enough for rounding to show."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (max(1, height // 3), max(1, width // 3), channels), np.uint8)
    small = small[..., 0] if channels == 1 else small
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


@functools.cache
def photograph(width, height, seed=0):
    """Statistics of a photograph: amplitudes fall as 1 / frequency, colours go together; a little grain."""
    random = np.random.default_rng(seed)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(down, right), 1 / max(width, height))
    layers = []
    for _ in range(2):
        phase = random.uniform(0, 2 * np.pi, amplitude.shape)
        layer = np.fft.irfft2(amplitude * np.exp(1j * phase), (height, width))
        layers.append(layer / layer.std())
    grey, tint = layers
    colours = np.stack([grey + 0.3 * tint, grey, grey - 0.3 * tint], axis=-1)
    pixels = (127 + 50 * colours + random.normal(0, 2, colours.shape)).clip(0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def bicubic(image, height, width):
    """By Pillow, across first: at once, it may start with the other pass, and overshoots clip otherwise."""
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.asarray(across.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)


def centred(image, size):
    """What CLIPImageProcessor does, by `bicubic`: (3, size, size)."""
    long = int(size * max(image.size) / min(image.size))
    height, width = (long, size) if image.width <= image.height else (size, long)
    top, left = (height - size) // 2, (width - size) // 2
    return bicubic(image, height, width)[:, top : top + size, left : left + size]


def processed(image, size=224):
    """CLIPImageProcessor's pixels before normalisation, (3, size, size)."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0].astype(int)


def cropped(image, size, crop=None, grid=1):
    """The training view by Pillow: full picture, a crop in steps of `grid` pixels, bicubic; (3, H, W)."""
    rows, columns = image.height // grid, image.width // grid
    if columns * size[0] >= rows * size[1]:
        part = rows, max(1, round(rows * size[1] / size[0]))
    else:
        part = max(1, round(columns * size[0] / size[1])), columns
    free = rows - part[0], columns - part[1]
    top, left = (free[0] // 2, free[1] // 2)
    if crop is not None:
        top, left = (int(place * (one + 1)) for place, one in zip(crop, free, strict=True))
    box = (grid * left, grid * top, grid * (left + part[1]), grid * (top + part[0]))
    return bicubic(image.crop(box), *size)


def assert_close(view, expected, *, mean, at_99_percent):
    levels = np.abs(view - expected)
    found = levels.mean(), np.percentile(levels, 99)
    assert found[0] <= mean, found
    assert found[1] <= at_99_percent, found


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
    view = clip_view(image, size)
    assert view.dtype == np.uint8
    np.testing.assert_allclose(view.transpose(2, 0, 1), processed(image, size), atol=RESIZE_LEVELS)
    assert abs((view.transpose(2, 0, 1) - processed(image, size)).mean()) < 0.01


def test_clip_view_of_a_ribbon_needs_no_ribbon_of_memory():
    image = Image.fromarray(noise(20_000, 40))
    view = clip_view(image, 64)
    whole = image.resize((32_000, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 15_968 : 15_968 + 64].astype(int)
    assert np.abs(view - expected).max() <= RESIZE_LEVELS


@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (333, 333), (150, 900)])
def test_clip_view_of_a_photograph_hardly_differs_from_the_processors(width, height):
    image = Image.fromarray(photograph(width, height))
    levels = np.abs(clip_view(image, 224).transpose(2, 0, 1) - processed(image))
    assert (levels > 0).mean() < 0.02
    assert levels.max() <= RESIZE_LEVELS


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 61), (61, 100), (7, 7), (65, 64)])
def test_square_view(width, height):
    pixels = noise(width, height)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    expected = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(
        square_view(Image.fromarray(pixels), 48), expected.astype(int), atol=RESIZE_LEVELS
    )


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
    with pytest.raises(SampleError, match=r"^a\.tar:key: cannot be decoded as an image") as caught:
        decode_image(data, "a.tar:key")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [9_500, 13_400])  # just above Pillow's two limits
def test_decompression_bombs_are_refused_undecoded(side):
    """A bilevel image is a few kilobytes in the file and gigabytes in memory."""
    data = encoded(Image.new("1", (side, side)), "PNG")
    assert len(data) < 60_000
    with pytest.raises(SampleError, match=r"^a\.tar:key: .*pixels.*shrink"):
        decode_image(data, "a.tar:key")


def test_decode_leaves_the_callers_warnings_alone():
    before = list(warnings.filters)
    decode_image(encoded(Image.new("RGB", (2, 2))), "x")
    assert list(warnings.filters) == before


# Both views of one decoding.

BOTH = Wanted(224, (512, 512))


@pytest.mark.parametrize(
    ("height", "width", "wanted", "expected"),
    [
        (512, 512, BOTH, 1),
        (1023, 1024, BOTH, 1),
        (1024, 1024, BOTH, 2),
        (1024, 4000, BOTH, 2),
        (2048, 2048, BOTH, 4),
        (4096, 4096, BOTH, 8),
        (40_960, 40_960, BOTH, 8),
        (895, 2000, Wanted(224, None), 1),
        (896, 2000, Wanted(224, None), 2),
        (1792, 2000, Wanted(224, None), 4),
        (640, 480, Wanted(None, (320, 240)), 2),
        (640, 480, Wanted(None, (240, 320)), 1),  # the crop is 360 pixels high
        (8, 1, Wanted(None, (1, 1)), 1),
        (1, 1, Wanted(1, (1, 1)), 1),
    ],
)
def test_a_picture_shrinks_while_every_view_is_covered(height, width, wanted, expected):
    assert denominator(height, width, wanted) == expected


sides = st.integers(1, 90)
places = st.floats(0, 1, exclude_max=True)


@examples(150)
@given(sides, sides, sides, sides, st.integers(1, 60), st.none() | st.tuples(places, places), st.booleans())
def test_views_are_pillows_within_the_tolerance(
    width, height, view_height, view_width, clip_size, crop, flip
):
    image = Image.fromarray(noise(width, height, seed=width * height))
    wanted = Wanted(clip_size, (view_height, view_width))
    clip, view = decode_views(encoded(image), "x", wanted, flip=flip, crop=crop)
    for array, shape in ((clip, (3, clip_size, clip_size)), (view, (3, view_height, view_width))):
        assert (array.dtype, array.shape) == (np.uint8, shape)
        assert array.flags.c_contiguous
    turn = slice(None, None, -1) if flip else slice(None)
    expected = cropped(image, wanted.size, crop)[..., turn]
    np.testing.assert_allclose(view, expected, atol=RESIZE_LEVELS)
    if max(width, height) <= 16 * min(width, height):  # CLIP's view of a ribbon is that of its middle
        np.testing.assert_allclose(clip, centred(image, clip_size)[..., turn], atol=RESIZE_LEVELS)


@examples(40)
@given(st.integers(1, 60), st.integers(1, 60), sides, sides, st.sampled_from(["PNG", "JPEG"]))
def test_mirroring_a_view_is_viewing_the_mirrored_picture(half_width, half_height, height, width, kind):
    """Where the free range is even; else its middle is not a whole pixel and the two are one pixel apart."""
    width, height = 4 * width, 4 * height
    pixels = noise(2 * half_width, 2 * half_height, seed=7)
    wanted = Wanted(None, (2 * half_height, 2 * half_height))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(pixels), kind, **options)
    decoded_pixels = np.asarray(decode_image(data, "x"))
    mirrored = encoded(Image.fromarray(np.ascontiguousarray(decoded_pixels[:, ::-1])))
    straight, flipped = (decode_views(data, "x", wanted, flip=flip)[1] for flip in (False, True))
    np.testing.assert_array_equal(flipped, straight[..., ::-1])
    np.testing.assert_allclose(
        decode_views(mirrored, "x", wanted)[1], flipped.astype(int), atol=RESIZE_LEVELS
    )


@pytest.mark.parametrize("width", [1024, 1031])
@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGB", {"progressive": True}), ("L", {})])
def test_jpeg_is_decoded_once_and_as_small_as_both_views_allow(monkeypatch, width, mode, options):
    shapes = []

    def recorded(*args, **kwargs):
        pixels = decode_jpeg(*args, **kwargs)
        shapes.append(pixels.shape[:2])
        return pixels

    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    data = encoded(Image.fromarray(photograph(width, 1024)).convert(mode), "JPEG", quality=90, **options)
    for size in (512, 256, 700):
        decode_views(data, "x", Wanted(224, (size, size)))
    decode_views(data, "x", Wanted(100, None))
    assert shapes == [(512, -(-width // 2))] * 2 + [(1024, width), (256, -(-width // 4))]


def test_a_halved_jpeg_that_fits_is_the_training_view_as_it_stands():
    data = encoded(Image.fromarray(photograph(600, 400)), "JPEG", quality=90)
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (300, 200))
    _, view = decode_views(data, "x", Wanted(None, (200, 300)))
    np.testing.assert_array_equal(view, np.asarray(draft).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("width", "height", "subsampling"),
    cases(
        [(*shape, sampling) for shape in [(1024, 1024), (1366, 1025), (1151, 1999)] for sampling in (0, 2)],
        [(1024, 1024, 0), (1366, 1025, 2), (1151, 1999, 2)].__contains__,
    ),
)
def test_shrunk_views_stay_near_the_full_pictures(width, height, subsampling):
    """CLIP's closely, also where the last pixels are parts of one; the other about as area averages would.

    Each is somewhat nearer on photographs than on this picture: see `denominator`.
    """
    pixels = photograph(width, height)
    data = encoded(Image.fromarray(pixels), "JPEG", quality=92, subsampling=subsampling)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    assert denominator(height, width, BOTH) == 2
    clip, view = decode_views(data, "x", BOTH)
    assert_close(clip, processed(full), mean=1.0, at_99_percent=4)
    assert_close(view, cropped(full, (512, 512), grid=2), mean=4.5, at_99_percent=15)
    clip, _ = decode_views(data, "x", Wanted(224, None))
    assert_close(clip, processed(full), mean=1.0, at_99_percent=4)


ORIENTED = list(product(["JPEG", "TIFF", "WEBP", "PNG"], range(1, 9), [(480, 320), (481, 323)]))


@pytest.mark.parametrize(("kind", "orientation", "size"), cases(ORIENTED, pairwise(ORIENTED).__contains__))
def test_orientation_comes_before_the_views(kind, orientation, size):
    width, height = size
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True, "method": 0} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(photograph(width, height)), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    clip, view = decode_views(data, "x", Wanted(80, (160, 200)), crop=(0.9, 0.9))
    halved = kind == "JPEG" and orientation < 5 and (orientation == 1 or width == 480)
    if halved:
        assert_close(clip, processed(upright, 80), mean=1.5, at_99_percent=5)
        assert_close(view, cropped(upright, (160, 200), (0.9, 0.9), grid=2), mean=6, at_99_percent=20)
    else:
        np.testing.assert_allclose(clip, processed(upright, 80), atol=RESIZE_LEVELS)
        np.testing.assert_allclose(view, cropped(upright, (160, 200), (0.9, 0.9)), atol=RESIZE_LEVELS)


def test_views_go_where_they_are_wanted():
    data = encoded(Image.fromarray(noise(50, 40)), "JPEG")
    clips, views = np.zeros((2, 3, 14, 14), np.uint8), np.zeros((2, 3, 24, 16), np.uint8)
    wanted = Wanted(14, (24, 16))
    clip, view = decode_views(data, "x", wanted, flip=True, clip_out=clips[1], out=views[1])
    assert np.shares_memory(clip, clips)
    assert np.shares_memory(view, views)
    for array, expected in zip((clips, views), decode_views(data, "x", wanted, flip=True), strict=True):
        np.testing.assert_array_equal(array[1], expected)
        assert not array[0].any()
    before = views.copy()
    with pytest.raises(SampleError):
        decode_views(data[:-9], "x", wanted, clip_out=clips[1], out=views[1])
    np.testing.assert_array_equal(views, before)
    assert decode_views(data, "x", Wanted(None, (8, 8)))[0] is None
    assert decode_views(data, "x", Wanted(14, None))[1] is None
    assert decode_views(data, "x", Wanted(None, None)) == (None, None)


def test_threads_decode_as_one_does():
    data = [encoded(Image.fromarray(photograph(200, 150, seed)), "JPEG") for seed in range(6)]
    data += [encoded(Image.fromarray(noise(80, 60)), kind) for kind in ("PNG", "WEBP", "GIF")]

    def views(one):
        return decode_views(one, "x", Wanted(32, (64, 64)))

    expected = [views(one) for one in data]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(views, data * 8)):
            for array, alone in zip(found, expected[number % len(data)], strict=True):
                np.testing.assert_array_equal(array, alone)


# What the files hold.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True},
        {"quality": 20},
        {"keep_rgb": True},
        {"restart_marker_blocks": 3},
    ],
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (8, 8), (77, 50)])
def test_jpeg_equals_pillows_to_the_bit(width, height, options):
    data = encoded(Image.fromarray(noise(width, height)), "JPEG", **options)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_first_picture_of_mpo_and_what_follows_a_jpeg():
    frames = [Image.fromarray(noise(64, 48, seed=seed)) for seed in (0, 1)]
    alone = encoded(frames[0], "JPEG", quality=95)
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(decoded(data), decoded(alone))
    np.testing.assert_array_equal(decoded(alone + b"appended by a camera"), decoded(alone))


def test_odd_bytes_between_headers_are_no_damage():
    data = encoded(Image.fromarray(noise(64, 48)), "JPEG")
    scan = data.index(b"\xff\xda")
    np.testing.assert_array_equal(decoded(data[:scan] + b"\0\0\0" + data[scan:]), decoded(data))


def test_inverted_cmyk_as_adobe_stores_it():
    """Pillow writes and reads Adobe's marker; without it the values are taken as inverted all the same."""
    rgb = Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8))
    data = encoded(rgb.convert("CMYK"), "JPEG", quality=100)
    marker = data.index(b"\xff\xee")
    length = int.from_bytes(data[marker + 2 : marker + 4], "big")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    for one in (data, data[:marker] + data[marker + 2 + length :]):
        np.testing.assert_allclose(decoded(one)[8, 8], (200, 100, 50), atol=4)
    _, view = decode_views(data, "x", Wanted(None, (4, 4)))
    np.testing.assert_allclose(view[:, 2, 2], (200, 100, 50), atol=4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "JPEG"])
def test_truncated_files_are_refused_wherever_they_end(kind):
    data = encoded(Image.fromarray(photograph(120, 90)), kind)
    assert decoded(data).shape == (90, 120, 3)
    for share in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(SampleError, match="cannot be decoded as an image") as caught:
            decode_views(data[: int(len(data) * share)], "x", Wanted(14, (32, 32)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_was_cut_and_closed_is_no_half_grey_picture(progressive):
    data = encoded(Image.fromarray(photograph(640, 480)), "JPEG", progressive=progressive)
    Image.open(io.BytesIO(data[: len(data) // 2] + b"\xff\xd9")).load()  # Pillow alone does not notice
    for wanted in (Wanted(14, (32, 32)), Wanted(None, (480, 640))):
        with pytest.raises(SampleError, match="premature end of data"):
            decode_views(data[: len(data) // 2] + b"\xff\xd9", "x", wanted)
        with pytest.raises(SampleError):
            decode_views(data[: len(data) // 2] + bytes(len(data) // 2), "x", wanted)


@examples(200)
@given(st.data())
def test_changed_bytes_give_pixels_or_one_line(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    content = bytearray(encoded(Image.fromarray(noise(40, 30)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        clip, view = decode_views(bytes(content), "x", Wanted(14, (16, 16)))
    except SampleError as error:
        line = str(error)
    else:
        line = "x: fine"
        assert (clip.shape, view.shape) == ((3, 14, 14), (3, 16, 16))
    assert line.startswith("x: ")
    assert "\n" not in line


def test_a_jpeg_bomb_is_refused_by_its_header():
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (50_000).to_bytes(2, "big") * 2
    with pytest.raises(SampleError, match=r"50000 x 50000 pixels.*shrink|could be decompression bomb"):
        decode_views(bytes(data), "x", BOTH)


def test_formats_that_start_other_programs_are_not_read():
    with pytest.raises(SampleError, match="no known format"):
        decode_image(encoded(Image.new("RGB", (4, 4)), "EPS"), "x")
