"""Indexing of existing tars: sidecars and a manifest, in parallel, from headers alone, restartable."""

import logging
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kandinsky_dist.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    read_folder_manifest,
    read_manifest,
    write_manifest,
)
from kandinsky_dist.data.patterns import resolve_shards
from kandinsky_dist.data.shard_index import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    read_shard_index,
    write_shard_index,
)
from kandinsky_dist.data.tarwalk import TarTable, walk_tar
from kandinsky_dist.errors import DataError

SHARDS_PER_PROCESS = 4
"""A process costs a third of a second to start: fewer shards than this are not worth one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Indexed:
    """What indexing one shard found."""

    shard: Shard
    num_without_image: int
    num_without_caption: int
    first_left_out: str


def index_shards(
    shards: str, *, num_processes: int = min(16, os.cpu_count() or 1), progress: bool = True
) -> Manifest:
    """Writes a sidecar beside each tar and, last, each folder's manifest.

    Only headers are read. A shard whose sidecar is newer than its last change is not read again, so an
    interrupted run continues where it was. Samples without an image or a caption are left out and counted.

    Args:
        shards: folder of tars, glob, brace pattern or list file; other shards that a folder's manifest
            already has stay in it.
        num_processes: shards that are read at a time.
        progress: show a bar on stderr when that is a terminal.

    Raises:
        DataError: a shard that is not a whole tar or has a key twice; no usable sample at all.
    """
    paths = resolve_shards(shards)
    num_processes = max(1, min(num_processes, len(paths) // SHARDS_PER_PROCESS))
    indexed: list[_Indexed] = []
    with tqdm(total=len(paths), desc="index", unit="shard", disable=None if progress else True) as bar:
        if num_processes == 1:
            for path in paths:
                indexed.append(_index_shard(path))
                bar.update()
        else:
            # spawn: the caller may have threads (tokenizers, torch), which do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
                try:
                    for item in pool.map(_index_shard, paths, chunksize=1):
                        indexed.append(item)
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    _report_left_out(shards, indexed)
    for folder in dict.fromkeys(path.parent for path in paths):
        rows = {
            path.name: item.shard for path, item in zip(paths, indexed, strict=True) if path.parent == folder
        }
        merged = {**_kept(folder), **rows}
        write_manifest(folder, [merged[name] for name in sorted(merged)])
    return read_manifest(shards)


def left_out_summary(indexed: list[_Indexed]) -> str:
    """Counts of samples that could not be used, or ""."""
    counts = {
        "no image": sum(item.num_without_image for item in indexed),
        "no caption": sum(item.num_without_caption for item in indexed),
    }
    if not any(counts.values()):
        return ""
    first = next(item.first_left_out for item in indexed if item.first_left_out)
    words = ", ".join(f"{count} with {reason}" for reason, count in counts.items() if count)
    return f"{sum(counts.values())} samples left out ({words}), first {first}"


def _report_left_out(shards: str, indexed: list[_Indexed]) -> None:
    summary = left_out_summary(indexed)
    if sum(item.shard.num_samples for item in indexed) == 0:
        raise DataError(
            f"shards={shards}: no sample with an image and a .{CAPTION_EXTENSION} in {len(indexed)} shards; "
            + (summary or "they are empty")
        )
    empty = [item.shard.path for item in indexed if item.shard.num_samples == 0]
    if empty:
        logger.warning("%d shards have no usable sample, first %s", len(empty), empty[0])
    if summary:
        logger.warning("%s", summary)


def _kept(folder: Path) -> dict[str, Shard]:
    """Shards of a folder's present manifest that are still there unchanged."""
    if not (folder / MANIFEST_NAME).exists():
        return {}
    try:
        shards = read_folder_manifest(folder).shards
    except DataError:
        return {}  # of another version or damaged: it is being replaced
    paths = {shard.path: folder / shard.path for shard in shards}
    return {
        shard.path: shard
        for shard in shards
        if paths[shard.path].is_file() and paths[shard.path].stat().st_size == shard.num_bytes
    }


def _index_shard(path: Path) -> _Indexed:
    """Indexes one shard, or takes what its sidecar says when the tar has not changed since."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    present = _present(path, status)
    if present is not None:
        return present
    table = walk_tar(path)
    keys, members, left_out = _samples(path, table)
    indexed = _Indexed(
        Shard(path.name, len(keys), table.num_bytes, table.fingerprint),
        sum(reason == "image" for reason, _ in left_out),
        sum(reason == "caption" for reason, _ in left_out),
        f"{path.name}:{left_out[0][1]}" if left_out else "",
    )
    metadata = {
        "fingerprint": table.fingerprint,
        "num_bytes": str(table.num_bytes),
        "mtime_ns": str(status.st_mtime_ns),
        "num_without_image": str(indexed.num_without_image),
        "num_without_caption": str(indexed.num_without_caption),
        "first_left_out": indexed.first_left_out,
    }
    write_shard_index(path, keys, members, metadata)
    return indexed


def _present(path: Path, status: os.stat_result) -> _Indexed | None:
    try:
        index = read_shard_index(path)
        metadata = index.metadata
        if (metadata["num_bytes"], metadata["mtime_ns"]) != (str(status.st_size), str(status.st_mtime_ns)):
            return None
        return _Indexed(
            Shard(path.name, len(index), int(metadata["num_bytes"]), metadata["fingerprint"]),
            int(metadata["num_without_image"]),
            int(metadata["num_without_caption"]),
            metadata["first_left_out"],
        )
    except (DataError, KeyError, ValueError):
        return None


Places = dict[str, tuple[int, int]]


def _samples(path: Path, table: TarTable) -> tuple[list[str], list[Places], list[tuple[str, str]]]:
    """Groups members into samples by WebDataset's naming: key up to the first dot, extension after it.

    Returns:
        keys, members and, for each sample that cannot be used, what it lacks and its key.
    """
    samples: dict[str, Places] = {}
    current = None
    for member in table.members:
        match = re.fullmatch(r"((?:.*/|)[^./]+)[.]([^/]*)", member.name, re.DOTALL)
        if match is None or re.search(r"(^|/)__[^/]*__($|/)", member.name):
            continue  # no extension, hidden, or WebDataset's own notes
        key, extension = match[1], match[2].lower()
        if (key != current and key in samples) or extension in samples.get(key, ()):
            raise DataError(
                f"{path} has the key {key!r} twice ({member.name}); keys must be unique in a shard"
            )
        samples.setdefault(key, {})[extension] = (member.offset, member.size)
        current = key
    keys, members, left_out = [], [], []
    for key, places in samples.items():
        if not any(extension in places for extension in IMAGE_EXTENSIONS):
            left_out.append(("image", key))
        elif CAPTION_EXTENSION not in places:
            left_out.append(("caption", key))
        else:
            keys.append(key)
            members.append(places)
    return keys, members, left_out
