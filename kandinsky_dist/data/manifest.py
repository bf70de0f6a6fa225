"""What a corpus consists of: each folder of shards has a manifest, which is read instead of the shards."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.patterns import resolve_shards
from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime.disk import write_whole

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1

logger = logging.getLogger(__name__)


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


def write_manifest(root: Path, shards: Iterable[Shard]) -> Manifest:
    """Writes a folder's manifest, whole or not at all."""
    manifest = Manifest(root, tuple(shards))
    content = {
        "version": MANIFEST_VERSION,
        "num_samples": manifest.num_samples,
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_whole(root / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
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


def read_manifest(shards: str, key: str = "shards") -> Manifest:
    """Finds a corpus and makes sure, without opening its shards, that they are all there.

    Args:
        shards: folder of tars, glob, brace pattern `train-{000..012}.tar` or list file (.txt, one path a
            line); the tars' folders must have been indexed.
        key: the setting that named it, for messages: "data.shards".

    Raises:
        DataError: nothing there, no manifest, a shard missing or of another size, no samples.
    """
    if Path(shards).is_dir():
        selected = [_whole_folder(Path(shards), key)]
    else:
        selected = _select(f"{key}={shards}", resolve_shards(shards, key))
    rows = [(part.root / shard.path, shard) for part in selected for shard in part.shards]
    _check_sizes(f"{key}={shards}", rows)
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
        raise DataError(f"{key}={shards} has {len(manifest.shards)} shards but no samples")
    return manifest


def _whole_folder(folder: Path, key: str) -> Manifest:
    tars = {path.name for path in resolve_shards(str(folder), key)}
    manifest = read_folder_manifest(folder)
    unlisted = sorted(tars - {shard.path for shard in manifest.shards})
    if unlisted:
        # Not an error: a corpus may grow while a run that was started on less of it is being resumed.
        logger.warning(
            "%d shards in %s are not in its manifest nor used, first %s; run: kandinsky-dist data index %s",
            len(unlisted),
            folder,
            unlisted[0],
            folder,
        )
    return manifest


def _select(problem: str, paths: list[Path]) -> list[Manifest]:
    """One single-shard manifest per path, from the manifests of the folders that the paths lie in."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(_missing(problem, missing, len(paths)))
    known = {
        folder: {row.path: row for row in read_folder_manifest(folder).shards}
        for folder in dict.fromkeys(path.parent for path in paths)
    }
    strangers = [path for path in paths if path.name not in known[path.parent]]
    if strangers:
        raise DataError(
            f"{len(strangers)} of {len(paths)} shards are not in a {MANIFEST_NAME}, first {strangers[0]}; "
            f"run: kandinsky-dist data index {strangers[0].parent}"
        )
    return [Manifest(path.parent, (known[path.parent][path.name],)) for path in paths]


def _check_sizes(problem: str, rows: list[tuple[Path, Shard]]) -> None:
    missing = []
    for path, shard in rows:
        try:
            num_bytes = path.stat().st_size
        except OSError:
            missing.append(path)
            continue
        if num_bytes != shard.num_bytes:
            raise DataError(
                f"{path} has {num_bytes} bytes, its manifest says {shard.num_bytes}: changed or cut short; "
                f"copy it again, or run: kandinsky-dist data index {path.parent}"
            )
    if missing:
        raise DataError(_missing(problem, missing, len(rows)))


def _missing(problem: str, missing: list[Path], num_shards: int) -> str:
    return (
        f"{problem}: {len(missing)} of {num_shards} shards are missing, first {missing[0]}; "
        "copy them again, or index what is there"
    )
