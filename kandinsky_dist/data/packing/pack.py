"""Shards from images and captions as people have them: the images' bytes untouched."""

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from kandinsky_dist.data.indexing.image_size import FORMATS
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.packing.pack_arrow import (
    HubDataset,
    ParquetSource,
    SavedDataset,
    is_parquet,
    is_saved_dataset,
)
from kandinsky_dist.data.packing.pack_sources import (
    METADATA_EXTENSION,
    TABLE_NAMES,
    Columns,
    FolderSource,
    Row,
    Source,
    TableSource,
    extension,
    walk,
)
from kandinsky_dist.data.packing.unique_keys import UniqueKeys
from kandinsky_dist.data.packing.writer import NoSamplesError, write_shards
from kandinsky_dist.data.shard_index import CAPTION_EXTENSION, IMAGE_EXTENSIONS
from kandinsky_dist.errors import ConfigError, DataError

FORMAT_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
NUM_NAMED = 3

logger = logging.getLogger(__name__)


def pack(
    source: str | Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    columns: Columns | None = None,
    split: str | None = None,
    subset: str | None = None,
) -> Manifest:
    """Packs images and captions into shards with a manifest, in memory that does not grow with their number.

    Args:
        source: folder with metadata.jsonl or metadata.csv (columns: the image's path in the folder, its
            caption); folder with images anywhere below it, each beside a .txt of the same name; folder that
            `datasets` saved; parquet file or folder of them; dataset of the hub, OWNER/NAME.
        out: folder of the shards, new or empty.
        samples_per_shard: the last shard may be shorter.
        columns: which columns to take. Of a caption that is a list, the first text that is not empty.
        split: of a dataset that has several.
        subset: of a hub dataset that has several, its configuration's name.

    Raises:
        ConfigError: no such source or column, or `out` holds something else.
        DataError: no image with a caption, or a table that cannot be read.
    """
    columns = columns or Columns()
    opened = open_source(source, columns, split=split, subset=subset)
    left_out = _LeftOut()
    origin = {
        "command": "data pack",
        "source": str(Path(source).resolve() if Path(source).exists() else source),
        "samples_per_shard": samples_per_shard,
        "columns": [columns.image, columns.caption, *columns.keep],
        "split": split,
        "subset": subset,
        "content_sha256": opened.content(),
    }
    samples = _samples(opened, left_out, keeps=bool(columns.keep))
    try:
        manifest = write_shards(samples, out, samples_per_shard=samples_per_shard, origin=origin)
    except NoSamplesError:
        why = f"left out: {left_out}" if left_out.counts else "it has no image files"
        raise DataError(f"{source}: no image with a caption; {why}") from None
    if left_out.counts:
        logger.warning("left out: %s", left_out)
    return manifest


def open_source(
    source: str | Path, columns: Columns, *, split: str | None = None, subset: str | None = None
) -> Source:
    """The kind of source that a path or name stands for; see `pack`."""
    path = Path(source)
    if not path.exists() and HUB_NAME.fullmatch(str(source)):
        return HubDataset(str(source), columns, split, subset)
    if subset is not None:
        raise ConfigError(f"--subset {subset} is for datasets of the hub, and {source} is a path")
    if path.is_dir() and is_saved_dataset(path):
        return SavedDataset(path, columns, split)
    if split is not None:
        raise ConfigError(f"--split {split}: {source} is not a dataset with splits; leave --split out")
    if path.is_file() and is_parquet(path):
        return ParquetSource(path, columns)
    if not path.is_dir():
        raise ConfigError(
            f"{source} is not a folder; give one with metadata.jsonl, metadata.csv or images, a folder of "
            "`datasets`, a .parquet file, or a hub name OWNER/NAME"
        )
    table = next((path / name for name in TABLE_NAMES if (path / name).is_file()), None)
    if table is not None:
        return TableSource(table, columns)
    return ParquetSource(path, columns) if _has_only_parquet(path) else _folder(path, columns)


def _folder(path: Path, columns: Columns) -> FolderSource:
    for column, option in ((columns.image, "--image-column"), (columns.caption, "--caption-column")):
        if column is not None:
            raise ConfigError(
                f"{option} {column}: {path} has no table but images, with captions in files beside them; "
                f"leave {option} out"
            )
    return FolderSource(path, columns)


def _has_only_parquet(folder: Path) -> bool:
    """Whether there are parquet files and no images, beside which they could be mere metadata."""
    is_found = False
    for path in walk(folder):
        if extension(path.name) in IMAGE_EXTENSIONS:
            return False
        is_found = is_found or is_parquet(path)
    return is_found


@dataclass
class _LeftOut:
    """What could not be packed: how many rows a reason, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.first.setdefault(reason, [])
        if len(names) < NUM_NAMED:
            names.append(name.encode("utf-8", "backslashreplace").decode())  # a terminal takes UTF-8 only

    def __str__(self) -> str:
        parts = []
        for reason, count in self.counts.items():
            more = ", ..." if count > NUM_NAMED else ""
            parts.append(f"{count} {reason} ({', '.join(self.first[reason])}{more})")
        return "; ".join(parts)


def _samples(source: Source, left_out: _LeftOut, *, keeps: bool) -> Iterator[dict[str, Any]]:
    keys = None if source.has_unique_names else UniqueKeys()
    rows = tqdm(source.rows(), total=source.num_rows, desc="pack", unit="image", disable=None)
    for row in rows:
        members, problem = _members(row, keeps)
        if problem:
            left_out.add(problem, row.name)
        else:
            yield {"__key__": row.name if keys is None else keys.of(row.name), **members}


def _members(row: Row, keeps: bool) -> tuple[dict[str, bytes], str]:
    """Members of a row's sample, or why there is none."""
    if row.image is None:
        return {}, "with a missing file"
    image_extension = _image_extension(row.name, row.image)
    if not image_extension:
        return {}, "that are no JPEG, PNG, WebP, BMP, GIF or TIFF"
    try:
        caption = _caption(row.caption)
    except TypeError:
        return {}, "whose caption is not a text"
    except UnicodeError:
        return {}, "whose caption is not UTF-8"
    if not caption:
        return {}, "without a caption"
    members = {image_extension: row.image, CAPTION_EXTENSION: caption}
    if keeps:
        if row.kept is None:
            return {}, "with a damaged .json"
        members[METADATA_EXTENSION] = _as_json(row.kept)
    return members, ""


def _caption(value: object) -> bytes:
    if isinstance(value, list):
        texts = (_caption(text) for text in value)
        return next((text for text in texts if text), b"")
    if value is None:
        return b""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig")
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value.strip().encode()


def _image_extension(name: str, data: bytes) -> str:
    """Extension of an image's member, or "" for what Pillow does not know; no pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in metadata, and of sizes that training judges
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                found = FORMAT_EXTENSIONS.get(image.format or "", "")
    except Exception:  # Pillow's parsers raise nearly anything on foreign bytes
        return ""
    return extension(name) if extension(name) in IMAGE_EXTENSIONS else found


def _as_json(kept: Mapping[str, Any]) -> bytes:
    """Columns as JSON: dates as text, numbers that are none as null."""
    try:
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(_finite(kept), ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return value
