"""Shards from a folder of images: their bytes untouched, captions from a table or from files beside them."""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.shard_index import CAPTION_EXTENSION, IMAGE_EXTENSIONS
from kandinsky_dist.data.writer import NoSamplesError, write_shards
from kandinsky_dist.errors import ConfigError, DataError

TABLES = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("file_name", "image")
NUM_NAMED = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """An image of the source folder; no caption yet when it is to be read from the file beside it."""

    path: Path
    caption: str | None


@dataclass
class _LeftOut:
    """What could not be packed, by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        parts = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > NUM_NAMED else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:NUM_NAMED])}{more})")
        return "; ".join(parts)


def pack(
    source: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    image_column: str | None = None,
    caption_column: str = "text",
) -> Manifest:
    """Packs images and captions into shards with a manifest.

    Args:
        source: folder with metadata.jsonl or metadata.csv (columns: the image's path in the folder, its
            caption), or with images anywhere below it, each beside a .txt of the same name.
        out: folder of the shards, new or empty.
        samples_per_shard: the last shard may be shorter.
        image_column: column of the path; None takes file_name, else image.
        caption_column: column of the caption.

    Raises:
        ConfigError: no such folder or column, or `out` holds something else.
        DataError: no image with a caption, or a table that cannot be read.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder; give one with metadata.jsonl, metadata.csv or images")
    table = next((source / name for name in TABLES if (source / name).is_file()), None)
    left_out = _LeftOut()
    pairs = _beside(source) if table is None else _listed(source, table, image_column, caption_column)
    origin = {
        "command": "data pack",
        "source": str(source.resolve()),
        "samples_per_shard": samples_per_shard,
        "content_sha256": _content(pairs),
    }
    samples = _samples(source, pairs, left_out)
    try:
        manifest = write_shards(samples, out, samples_per_shard=samples_per_shard, origin=origin)
    except NoSamplesError:
        why = f"left out: {left_out}" if left_out.names else "it has no image files"
        raise DataError(f"{source}: no image with a caption; {why}") from None
    if left_out.names:
        logger.warning("left out: %s", left_out)
    return manifest


def _beside(source: Path) -> list[_Pair]:
    """All images below a folder, in the order of their paths; hidden files and folders are not looked at."""
    pairs = []
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _extension(name) in IMAGE_EXTENSIONS and not name.startswith("."):
                pairs.append(_Pair(Path(folder, name), None))
    return sorted(pairs, key=lambda pair: pair.path)


def _listed(source: Path, table: Path, image_column: str | None, caption_column: str) -> list[_Pair]:
    """The rows of a table, in their order."""
    rows = _rows(table)
    columns = list(rows[0]) if rows else []
    image_column = image_column or next((name for name in IMAGE_COLUMNS if name in columns), IMAGE_COLUMNS[0])
    for name, option in ((image_column, "--image-column"), (caption_column, "--caption-column")):
        if name not in columns:
            raise ConfigError(
                f"{table} has no column {name}; it has {', '.join(columns) or 'no rows'}: give {option}"
            )
    return [_Pair(source / str(row.get(image_column)), str(row.get(caption_column) or "")) for row in rows]


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                return list(csv.DictReader(file))
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{table} must have one object a line: {{"file_name": "a.jpg", "text": "a caption"}}')
    return rows


def _samples(source: Path, pairs: list[_Pair], left_out: _LeftOut) -> Iterator[dict[str, Any]]:
    keys: set[str] = set()
    for pair in tqdm(pairs, desc="pack", unit="image", disable=None):
        name = os.path.relpath(pair.path, source)
        try:
            data = pair.path.read_bytes()
        except OSError:
            left_out.add("with a missing file", name)
            continue
        if _extension(name) not in IMAGE_EXTENSIONS or not _is_image(data):
            left_out.add("that are not images", name)
            continue
        caption = _caption_beside(pair.path) if pair.caption is None else pair.caption.strip()
        if not caption:
            left_out.add("without a caption", name)
            continue
        yield {
            "__key__": _unique_key(name, keys),
            _extension(name): data,
            CAPTION_EXTENSION: caption.encode(),
        }


def _caption_beside(path: Path) -> str:
    try:
        return path.with_suffix(f".{CAPTION_EXTENSION}").read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _is_image(data: bytes) -> bool:
    """Whether Pillow knows the format; pixels are decoded only in training."""
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception:  # Pillow's parsers raise nearly anything on foreign bytes
        return False
    return True


def _unique_key(name: str, keys: set[str]) -> str:
    """A sample's key: the path without extension, and without dots in its last part, where a key ends."""
    path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("..", "/")))
    plain = str(path.with_name(path.stem.replace(".", "_") or "_"))
    key, number = plain, 1
    while key in keys:
        number += 1
        key = f"{plain}-{number}"
    keys.add(key)
    return key


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _content(pairs: list[_Pair]) -> str:
    """Changes when a file or a caption does, going by sizes and modification times."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.path}\0{pair.caption}".encode("utf-8", "surrogateescape"))
        for path in (pair.path, pair.path.with_suffix(f".{CAPTION_EXTENSION}")):
            if path.exists():
                digest.update(f"\0{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
