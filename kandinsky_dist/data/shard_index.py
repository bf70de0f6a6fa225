"""The sidecar of a shard: where every sample of the tar lies, and what is known of it without decoding.

Letters of shapes: N samples of a shard, E extensions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from kandinsky_dist.data.aspects import NUM_ASPECTS, nearest_aspects
from kandinsky_dist.data.locations import Texts, is_remote
from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime.disk import write_whole

SIDECAR_VERSION = "2"
SIDECAR_SUFFIX = ".idx"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
CAPTION_EXTENSION = "txt"

Places = dict[str, tuple[int, int]]
"""Extension -> (offset, size) in bytes inside the tar."""


@dataclass(frozen=True)
class IndexedSample:
    """What indexing finds of one sample.

    Attributes:
        key: its members' common name up to the first dot.
        places: where each member lies.
        checksums: CRC-32 of each member that was read whole.
        width, height: of the upright image in pixels; 0 where unknown.
    """

    key: str
    places: Places
    checksums: Mapping[str, int]
    width: int = 0
    height: int = 0


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one tar lie. Arrays are memory-mapped: what is not asked for is not read."""

    extensions: tuple[str, ...]
    offsets_NE: npt.NDArray[np.int64]
    sizes_NE: npt.NDArray[np.int64]
    checksums_NE: npt.NDArray[np.int64]
    """CRC-32 of the members, -1 where unknown."""
    keys_N: Texts
    widths_N: npt.NDArray[np.int32]
    heights_N: npt.NDArray[np.int32]
    metadata: dict[str, str]
    """`fingerprint`, `num_bytes` and `mtime_ns` of the tar, and what was left out of it."""

    def __len__(self) -> int:
        return len(self.keys_N)

    def members(self, row: int) -> Places:
        """Extension -> (offset, size) in bytes of the members that a sample has."""
        places = zip(self.extensions, self.offsets_NE[row].tolist(), self.sizes_NE[row].tolist(), strict=True)
        return {extension: (offset, size) for extension, offset, size in places if offset >= 0}

    def checksums(self, row: int) -> dict[str, int]:
        """Extension -> CRC-32 of a sample's members, where known."""
        known = zip(self.extensions, self.checksums_NE[row].tolist(), strict=True)
        return {extension: checksum for extension, checksum in known if checksum >= 0}

    @cached_property
    def aspects_N(self) -> npt.NDArray[np.uint8]:
        """Aspect bucket of each sample."""
        return nearest_aspects(self.widths_N, self.heights_N)

    def aspect_counts(self) -> npt.NDArray[np.int64]:
        """Samples in each aspect bucket."""
        return np.bincount(self.aspects_N, minlength=NUM_ASPECTS)


def write_shard_index(path: Path, samples: Sequence[IndexedSample], metadata: Mapping[str, str]) -> None:
    """Writes a sidecar, whole or not at all.

    Args:
        path: of the sidecar.
        samples: in the order of the tar.
        metadata: see `ShardIndex.metadata`.
    """
    extensions = sorted({extension for sample in samples for extension in sample.places})
    columns = {extension: column for column, extension in enumerate(extensions)}
    known = np.full((3, len(samples), len(extensions)), -1, np.int64)
    for row, sample in enumerate(samples):
        for extension, place in sample.places.items():
            known[:2, row, columns[extension]] = place
        for extension, checksum in sample.checksums.items():
            known[2, row, columns[extension]] = checksum
    keys = Texts.of([sample.key for sample in samples])
    data = safetensors.numpy.save(
        {
            "offsets": known[0],
            "sizes": known[1],
            "checksums": known[2],
            "key_bytes": keys.text_bytes,
            "key_ends": keys.ends,
            "widths": np.array([sample.width for sample in samples], np.int32),
            "heights": np.array([sample.height for sample in samples], np.int32),
        },
        {**metadata, "extensions": json.dumps(extensions), "version": SIDECAR_VERSION},
    )
    write_whole(path, data)


def read_shard_index(location: str, remedy: str, data: bytes | None = None) -> ShardIndex:
    """Opens a sidecar; a local one without reading its arrays.

    Args:
        location: path of the sidecar; or where `data` came from, for messages.
        remedy: what makes it anew, a command.
        data: content of one that is not a local file.

    Raises:
        DataError: no sidecar, or not one of ours.
    """
    try:
        # safetensors' own reader copies whole arrays; with a few hundred shards open in each of many worker
        # processes that would be gigabytes, mapped pages are shared.
        content = np.frombuffer(data, np.uint8) if data is not None else mapped(location)
        header, start = read_header(content)
        metadata = header["__metadata__"]
        if metadata["version"] != SIDECAR_VERSION:
            raise ValueError(f"version {metadata['version']}, this program reads {SIDECAR_VERSION}")

        def array(name: str, dtype: type) -> npt.NDArray:
            begin, end = header[name]["data_offsets"]
            return content[start + begin : start + end].view(dtype).reshape(header[name]["shape"])

        return ShardIndex(
            tuple(json.loads(metadata["extensions"])),
            array("offsets", np.int64),
            array("sizes", np.int64),
            array("checksums", np.int64),
            Texts(array("key_bytes", np.uint8), array("key_ends", np.int64)),
            array("widths", np.int32),
            array("heights", np.int32),
            metadata,
        )
    except FileNotFoundError:
        raise DataError(f"{location} is missing; run: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{location} cannot be read ({error}); run: {remedy}") from error


def mapped(path: str) -> npt.NDArray[np.uint8]:
    """A local file's bytes, memory-mapped."""
    assert not is_remote(path)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def read_header(content: npt.NDArray[np.uint8]) -> tuple[dict, int]:
    """The JSON header of a safetensors file, and where its arrays start."""
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if start > len(content):
        raise ValueError("cut short")
    return json.loads(content[8:start].tobytes()), start
