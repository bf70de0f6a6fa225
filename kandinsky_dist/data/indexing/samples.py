"""Which members of a tar make up a sample, by WebDataset's naming, and which samples can be used."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kandinsky_dist.data.indexing.tar_readers import DamagedShardError
from kandinsky_dist.data.indexing.tarwalk import Member
from kandinsky_dist.data.shard_index import IMAGE_EXTENSIONS, IndexedSample, Places

CACHED_EXTENSION = "cached"
"""Encoder outputs: a sample that has them needs no image and no caption."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key up to the first dot and lower-case extension after it; None for what is no part of a sample."""
    match = re.fullmatch(r"((?:.*/|)[^./]+)[.]([^/]*)", name, re.DOTALL)
    if match is None or re.search(r"(^|/)__[^/]*__($|/)", name):
        return None  # no extension, hidden, or WebDataset's own notes
    return match[1], match[2].lower()


def is_image(name: str) -> bool:
    """Whether a member is a sample's image: .seg.png and the like are something else."""
    parts = split_name(name)
    return parts is not None and parts[1] in IMAGE_EXTENSIONS


@dataclass
class _Parts:
    places: Places = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


def group_samples(
    location: str, members: Sequence[Member], captions: Sequence[str]
) -> tuple[list[IndexedSample], list[tuple[str, str]]]:
    """Samples of a shard in its order.

    Args:
        location: of the shard, for messages.
        members: of the tar.
        captions: extensions of which a sample needs one, beside its image.

    Returns:
        usable samples and, for each other one, what it lacks ("image", "caption") and its key.

    Raises:
        DamagedShardError: a key that is there twice.
    """
    found: dict[str, _Parts] = {}
    current = None
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        if (key != current and key in found) or (key == current and extension in found[key].places):
            raise DamagedShardError(
                f"{location} has the key {key!r} twice ({member.name}); keys must be unique in a shard"
            )
        sample = found.setdefault(key, _Parts())
        sample.places[extension] = (member.offset, member.size)
        if member.checksum >= 0:
            sample.checksums[extension] = member.checksum
        sample.image_sizes[extension] = (member.width, member.height)
        current = key
    usable, left_out = [], []
    for key, sample in found.items():
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in sample.places), None)
        if CACHED_EXTENSION not in sample.places:
            if image is None:
                left_out.append(("image", key))
                continue
            if not any(extension in sample.places for extension in captions):
                left_out.append(("caption", key))
                continue
        width, height = (0, 0) if image is None else sample.image_sizes[image]
        usable.append(IndexedSample(key, sample.places, sample.checksums, width, height))
    return usable, left_out
