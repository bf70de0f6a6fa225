"""The sidecar of a shard: where every sample of the tar lies.

Letters of shapes: N samples of a shard, E extensions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime.disk import write_whole

SIDECAR_VERSION = "1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
CAPTION_EXTENSION = "txt"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one tar lie. Arrays are memory-mapped: what is not asked for is not read."""

    extensions: tuple[str, ...]
    offsets_NE: npt.NDArray[np.int64]
    sizes_NE: npt.NDArray[np.int64]
    key_bytes: npt.NDArray[np.uint8]
    key_ends_N: npt.NDArray[np.int64]
    metadata: dict[str, str]
    """`fingerprint`, `num_bytes` and `mtime_ns` of the tar, and what was left out of it."""

    def __len__(self) -> int:
        return len(self.key_ends_N)

    def key(self, index: int) -> str:
        """Key of a sample: its members' common name up to the first dot."""
        start = int(self.key_ends_N[index - 1]) if index else 0
        return (
            self.key_bytes[start : int(self.key_ends_N[index])].tobytes().decode("utf-8", "surrogateescape")
        )

    def members(self, index: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) in bytes of the members that a sample has."""
        places = zip(
            self.extensions, self.offsets_NE[index].tolist(), self.sizes_NE[index].tolist(), strict=True
        )
        return {extension: (offset, size) for extension, offset, size in places if offset >= 0}


def sidecar_path(tar: Path) -> Path:
    """Sidecar of a shard: beside it, with .idx appended."""
    return tar.with_name(tar.name + ".idx")


def write_shard_index(
    tar: Path, keys: list[str], members: list[dict[str, tuple[int, int]]], metadata: dict[str, str]
) -> None:
    """Writes the sidecar of a shard, whole or not at all."""
    extensions = sorted({extension for sample in members for extension in sample})
    places = np.full((2, len(keys), len(extensions)), -1, np.int64)
    columns = {extension: column for column, extension in enumerate(extensions)}
    for row, sample in enumerate(members):
        for extension, place in sample.items():
            places[:, row, columns[extension]] = place
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    data = safetensors.numpy.save(
        {
            "offsets": places[0],
            "sizes": places[1],
            "key_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.int64),
        },
        {**metadata, "extensions": json.dumps(extensions), "version": SIDECAR_VERSION},
    )
    write_whole(sidecar_path(tar), data)


def read_shard_index(tar: Path) -> ShardIndex:
    """Opens the sidecar of a shard without reading its arrays.

    Raises:
        DataError: no sidecar, or not one of ours.
    """
    path = sidecar_path(tar)
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start, 1 << 24) - 8))
        # safetensors' own reader copies whole arrays; with a few hundred shards open in each of many worker
        # processes that would be gigabytes, mapped pages are shared.
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))

        def array(name: str, dtype: type) -> npt.NDArray:
            begin, end = header[name]["data_offsets"]
            return mapped[start + begin : start + end].view(dtype).reshape(header[name]["shape"])

        metadata = header["__metadata__"]
        if metadata["version"] != SIDECAR_VERSION:
            raise ValueError(f"version {metadata['version']}")
        return ShardIndex(
            tuple(json.loads(metadata["extensions"])),
            array("offsets", np.int64),
            array("sizes", np.int64),
            array("key_bytes", np.uint8),
            array("key_ends", np.int64),
            metadata,
        )
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run: kandinsky-dist data index {tar.parent}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); run: kandinsky-dist data index {tar.parent}"
        ) from error
