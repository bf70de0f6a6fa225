"""Width and height of an image from its header alone, as it is seen upright."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from kandinsky_dist.data.indexing.tar_readers import Reader

ORIENTATION = 0x0112
"""EXIF's tag. Source: CIPA DC-008, 4.6.5.1.6."""
SIDEWAYS = (5, 6, 7, 8)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
HEAD_BYTES = 4096


class Payload(io.RawIOBase):
    """A member of a tar as a file."""

    def __init__(self, reader: Reader, offset: int, size: int) -> None:
        self._reader, self._offset, self._size = reader, offset, size
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place in the member."""
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fills a buffer with what follows."""
        size = max(0, min(len(buffer), self._size - self._position))
        data = self._reader.read(self._offset + self._position, size) if size else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def member_file(reader: Reader, offset: int, size: int) -> BinaryIO:
    """A member as a buffered file."""
    return cast(BinaryIO, io.BufferedReader(Payload(reader, offset, size), HEAD_BYTES))


@contextmanager
def large_images_are_fine() -> Iterator[None]:
    """Within it, Pillow does not warn of large images: nothing is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def upright_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height in pixels with EXIF orientation applied; (0, 0) if it cannot be told.

    Nothing is decoded, and only the header is read, except of WebP images with EXIF data.
    """
    try:
        size = _webp_size(file.read(30))
        if size is not None:
            return size
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # its size is upright already, in some versions of Pillow
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
            # The base class: a PNG's own method decodes the picture in search of the tag.
            orientation = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # Pillow and foreign bytes: struct.error, SyntaxError, KeyError, bombs, ...
        return 0, 0
    return (height, width) if orientation in SIDEWAYS else (width, height)


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Size of a WebP image that has no EXIF data: Pillow would read all of it.

    Source: RFC 9649, sections 2.5 to 2.7; RFC 6386, section 9.1.
    """
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and not head[20] & 0x08:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None
