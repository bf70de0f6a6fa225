"""What a corpus consists of: a manifest per folder of shards, and a sidecar per shard that locates every sample.

Letters of shapes: N samples of a shard, E extensions.
"""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from kandinsky_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
SIDECAR_VERSION = "1"


@dataclass(frozen=True)
class Shard:
    """One tar. `path` is relative to the manifest's folder, `fingerprint` that of `tarwalk.TarTable`."""

    path: str
    num_samples: int
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The shards of a corpus in their order."""

    root: Path
    shards: tuple[Shard, ...]

    @cached_property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples of each shard, int64."""
        return np.array([shard.num_samples for shard in self.shards], np.int64)

    @cached_property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.shard_sizes.sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and fingerprints of the shards; the same wherever the folder lies."""
        digest = hashlib.sha256()
        for shard in self.shards:
            name = PurePosixPath(shard.path).name
            digest.update(f"{name}\0{shard.num_samples}\0{shard.fingerprint}\n".encode())
        return digest.hexdigest()

    def shard_path(self, shard: int) -> Path:
        """Where the tar of a shard lies."""
        return self.root / self.shards[shard].path


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
    write_atomically(sidecar_path(tar), data)


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


def write_manifest(root: Path, shards: Iterable[Shard]) -> Manifest:
    """Writes a folder's manifest, whole or not at all."""
    manifest = Manifest(root, tuple(shards))
    content = {
        "version": MANIFEST_VERSION,
        "num_samples": manifest.num_samples,
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_atomically(root / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())
    return manifest


def read_folder_manifest(folder: Path) -> Manifest:
    """A folder's manifest as it was written, without a look at the shards.

    Raises:
        DataError: no manifest, or not one of ours.
    """
    path = folder / MANIFEST_NAME
    remedy = f"run: kandinsky-dist data index {folder}"
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {content['version']}, this program reads {MANIFEST_VERSION}")
        shards = tuple(
            Shard(str(row["path"]), int(row["num_samples"]), int(row["num_bytes"]), str(row["fingerprint"]))
            for row in content["shards"]
        )
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST_NAME}; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    return Manifest(folder, shards)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under another name and renames it, so that a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_manifest(shards: str) -> Manifest:
    """Finds a corpus and makes sure, without opening its shards, that they are all there.

    Args:
        shards: folder of tars, glob, brace pattern `train-{000..012}.tar` or list file (.txt, one path a
            line); the tars' folders must have been indexed.

    Raises:
        DataError: nothing there, no manifest, a shard missing or of another size, no samples.
    """
    if Path(shards).is_dir():
        selected = [read_folder_manifest(Path(shards))]
    else:
        selected = _select(shards, resolve_shards(shards))
    rows = [(part.root / shard.path, shard) for part in selected for shard in part.shards]
    _check_sizes(shards, rows)
    roots = {part.root for part in selected}
    if len(roots) == 1:
        manifest = Manifest(roots.pop(), tuple(shard for _, shard in rows))
    else:
        root = Path(os.path.commonpath([path.absolute() for path, _ in rows]))
        moved = [
            Shard(
                path.absolute().relative_to(root).as_posix(), row.num_samples, row.num_bytes, row.fingerprint
            )
            for path, row in rows
        ]
        manifest = Manifest(root, tuple(moved))
    if manifest.num_samples == 0:
        raise DataError(f"data.shards={shards} has {len(manifest.shards)} shards but no samples")
    return manifest


def resolve_shards(shards: str) -> list[Path]:
    """The tars that a folder, glob, brace pattern or list file names, sorted or in the pattern's order.

    Raises:
        DataError: none, or a list file that cannot be read.
    """
    if re.match(r"[a-z0-9]+:(//)?", shards):
        raise DataError(f"data.shards={shards}: remote shards cannot be read yet; copy them to a folder")
    path = Path(shards)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.suffix == ".txt":
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except OSError as error:
            raise DataError(f"data.shards={shards}: {error.strerror or error}") from error
        names = [line for line in lines if line and not line.startswith("#")]
        found = [path.parent / name for line in names for name in _expand_braces(line)]
    elif "{" in shards:
        found = [Path(name) for name in _expand_braces(shards)]
    elif glob.has_magic(shards):
        found = [Path(name) for name in sorted(glob.glob(shards))]
    elif path.suffix == ".tar":
        found = [path]
    else:
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"data.shards={shards} {what}; give a folder of .tar shards, a glob or a list file")
    if not found:
        raise DataError(f"data.shards={shards} names no .tar shards; to make some: kandinsky-dist data pack")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise DataError(f"data.shards={shards} names {twice} twice; list each shard once")
    return found


def _select(shards: str, paths: list[Path]) -> list[Manifest]:
    """One single-shard manifest per path, from the manifests of the folders that the paths lie in."""
    known = {
        folder: {row.path: row for row in read_folder_manifest(folder).shards}
        for folder in dict.fromkeys(path.parent for path in paths)
    }
    strangers = [path for path in paths if path.name not in known[path.parent]]
    if strangers:
        missing = [path for path in strangers if not path.exists()]
        if missing:
            raise DataError(_missing(shards, missing, len(paths)))
        raise DataError(
            f"{strangers[0]} is not in its folder's {MANIFEST_NAME} ({len(strangers)} of {len(paths)} are not); "
            f"run: kandinsky-dist data index {strangers[0].parent}"
        )
    return [Manifest(path.parent, (known[path.parent][path.name],)) for path in paths]


def _check_sizes(shards: str, rows: list[tuple[Path, Shard]]) -> None:
    missing = []
    for path, shard in rows:
        try:
            num_bytes = path.stat().st_size
        except OSError:
            missing.append(path)
            continue
        if num_bytes != shard.num_bytes:
            raise DataError(
                f"{path} has {num_bytes} bytes, its manifest says {shard.num_bytes}: it changed or is cut short; "
                f"copy it again, or run: kandinsky-dist data index {path.parent}"
            )
    if missing:
        raise DataError(_missing(shards, missing, len(rows)))


def _missing(shards: str, missing: list[Path], num_shards: int) -> str:
    return (
        f"data.shards={shards}: {len(missing)} of {num_shards} shards are missing, first {missing[0]}; "
        "copy them again, or index what is there"
    )


def _expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with {first..last} and {a,b} parts; leading zeros give the width."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices: list[list[str]] = []
    for part in parts:
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            first, last = int(span[1]), int(span[2])
            width = len(span[1]) if span[1].startswith("0") else 0
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        elif part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return ["".join(words) for words in itertools.product(*choices)]
