"""Small real tars to test with."""

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """An image file that differs from those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of the given members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, **replaced: bytes) -> list[tuple[str, bytes]]:
    """Members of a good sample; its key is its number in five digits."""
    members: Mapping[str, bytes] = {"png": picture(number), "txt": f"caption {number}".encode(), **replaced}
    return [(f"{number:05d}.{extension}", data) for extension, data in members.items()]


def fail_reads(path: Path) -> None:
    """Makes every read fail of a file that this process has open, as on a disk that is gone."""
    folder = os.open(path.parent, os.O_RDONLY)
    for number in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", number)
        if link.exists() and link.resolve() == path.resolve():
            os.dup2(folder, int(number), inheritable=False)
    os.close(folder)
