"""Drawn pictures whose captions say what is on them, packed into small tars."""

import io
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from kandinsky_dist.data.packing.writer import write_shards

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "teal", "brown")
SHAPES = ("disc", "box", "triangle")
PLACES = ("left", "right", "top", "bottom")
SIDES = (64, 72, 80, 96)


def draw(number: int) -> tuple[Image.Image, str]:
    """A shape on white, 64 to 96 px a side and mostly not square, and its caption; the number decides."""
    colour, shape = COLOURS[number % 8], SHAPES[number // 8 % 3]
    place = PLACES[number // 24 % 4]
    size = SIDES[number % 4], SIDES[number // 4 % 4]
    image = Image.new("RGB", size, "white")
    x = size[0] * {"left": 0.3, "right": 0.7}.get(place, 0.5)
    y = size[1] * {"top": 0.3, "bottom": 0.7}.get(place, 0.5)
    radius = min(size) * (0.15 + 0.02 * (number % 7))
    around = (x - radius, y - radius, x + radius, y + radius)
    canvas = ImageDraw.Draw(image)
    if shape == "disc":
        canvas.ellipse(around, fill=colour)
    elif shape == "box":
        canvas.rectangle(around, fill=colour)
    else:
        canvas.polygon([(x, around[1]), (around[0], around[3]), (around[2], around[3])], fill=colour)
    return image, f"a {colour} {shape} at the {place}, number {number}"


def write_corpus(out: Path, first: int, num_samples: int, *, samples_per_shard: int, prefix: str) -> None:
    """Packs pictures into `out`; their keys are their numbers. A complete corpus is kept."""
    numbers = range(first, first + num_samples)
    write_shards(
        _samples(numbers),
        out,
        samples_per_shard=samples_per_shard,
        origin={"drawn": [numbers.start, numbers.stop], "samples_per_shard": samples_per_shard},
        prefix=prefix,
    )


def _samples(numbers: range) -> Iterator[dict[str, Any]]:
    for number in numbers:
        image, caption = draw(number)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield {"__key__": f"{number:05d}", "png": buffer.getvalue(), "txt": caption.encode()}


def damage_samples(folder: Path, share: float) -> int:
    """Flips bytes in the middle of a random share of the images, behind the index' back."""
    num_damaged, chance = 0, random.Random(3)
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            places = [(member.offset_data, member.size) for member in archive if member.name.endswith("png")]
        times = os.stat(tar)
        with open(tar, "r+b") as file:
            for offset, size in places:
                if chance.random() < share:
                    num_damaged += 1
                    file.seek(offset + size // 2)
                    file.write(b"\xff" * 16)
        os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    return num_damaged
