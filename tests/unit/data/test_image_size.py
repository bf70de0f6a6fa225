import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from kandinsky_dist.data.indexing.image_size import upright_size


def encoded(
    kind: str, orientation: int | None = None, size: tuple[int, int] = (300, 200), **options
) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


class Counted(io.BytesIO):
    """How far a file was read."""

    furthest = 0

    def read(self, size=-1):
        data = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        return data


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_as_it_is_seen_upright(kind, orientation):
    data = encoded(kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        assert upright_size(io.BytesIO(data)) == ImageOps.exif_transpose(image).size


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_formats_without_orientation(kind):
    assert upright_size(io.BytesIO(encoded(kind))) == (300, 200)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"quality": 5}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_of_every_kind(options, mode):
    buffer = io.BytesIO()
    Image.new(mode, (3001, 17), (255, 0, 0, 100)[: len(mode)]).save(buffer, "WEBP", **options)
    assert upright_size(io.BytesIO(buffer.getvalue())) == (3001, 17)


@pytest.mark.parametrize(
    ("kind", "limit_bytes"), [("JPEG", 4096), ("PNG", 4096), ("WEBP", 4096), ("BMP", 4096)]
)
def test_only_the_header_is_read(kind, limit_bytes):
    file = Counted(encoded(kind))
    assert upright_size(file) == (300, 200)
    assert file.furthest <= limit_bytes < len(file.getvalue())


def test_a_header_behind_much_metadata():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 30_000
    assert upright_size(io.BytesIO(encoded("JPEG", exif=exif, icc_profile=bytes(60_000)))) == (200, 300)


def test_what_cannot_be_told_is_nothing():
    whole = encoded("JPEG", 6)
    for data in (b"", b"x", b"RIFF", b"\x89PNG\r\n\x1a\n", whole[:20], whole[:100], b"II*\0" + b"\xff" * 40):
        assert upright_size(io.BytesIO(data)) == (0, 0), data
    bomb = bytearray(encoded("BMP"))
    bomb[18:26] = b"\xff\xff\xff\x7f" * 2
    assert upright_size(io.BytesIO(bomb)) == (0, 0)
