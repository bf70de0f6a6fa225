"""What `data pack` reads: rows of images and captions, one after another and never all in memory."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tqdm import tqdm

from kandinsky_dist.data.shard_index import CAPTION_EXTENSION, IMAGE_EXTENSIONS
from kandinsky_dist.errors import ConfigError, DataError

METADATA_EXTENSION = "json"
TABLE_NAMES = ("metadata.jsonl", "metadata.csv")
PATH_COLUMNS = ("file_name", "image")
CAPTION_COLUMNS = ("text", "caption")
COLUMN_NAMES = {"image": "--image-column", "caption": "--caption-column", "keep": "--keep-columns"}


@dataclass(frozen=True)
class Columns:
    """Which columns of a source are packed; None takes the first of the usual names.

    Attributes:
        keep: go into a .json member of each sample.
    """

    image: str | None = None
    caption: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a source, not judged yet.

    Attributes:
        name: of the image inside the source; its key is made from it, and messages call it so.
        image: content of its file; None if there is none.
        caption: a text, its bytes, a list of texts, or nothing usable.
        kept: columns to keep; None if they cannot be read.
    """

    name: str
    image: bytes | None
    caption: object
    kept: Mapping[str, Any] | None


class Source(Protocol):
    """Rows to pack.

    Attributes:
        num_rows: None until `content` was called, or if it cannot be known.
        has_unique_names: no two rows have the same name.
    """

    num_rows: int | None
    has_unique_names: bool

    def content(self) -> str:
        """A digest that changes when the source does, going by sizes and modification times of its files."""
        ...

    def rows(self) -> Iterator[Row]:
        """The rows in an order that is always the same."""
        ...


class FolderSource:
    """Images anywhere below a folder, in the order of their paths; captions and metadata beside them.

    Hidden files and folders are not looked at. The names of one folder's files are in memory at a time.
    """

    has_unique_names = False

    def __init__(self, folder: Path, columns: Columns) -> None:
        self._folder = folder
        self._keep = columns.keep
        self.num_rows: int | None = None

    def content(self) -> str:
        """See `Source`."""
        digest, num_rows = hashlib.sha256(), 0
        for path in _scanned(walk(self._folder)):
            if extension(path.name) in IMAGE_EXTENSIONS:
                num_rows += 1
                digest.update(f"{path}\n".encode("utf-8", "surrogateescape"))
                for part in (path, _beside(path, CAPTION_EXTENSION), _beside(path, METADATA_EXTENSION)):
                    digest.update(_version(part))
        self.num_rows = num_rows
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """See `Source`."""
        for path in walk(self._folder):
            if extension(path.name) in IMAGE_EXTENSIONS:
                yield Row(
                    path.relative_to(self._folder).as_posix(),
                    _content(path),
                    _content(_beside(path, CAPTION_EXTENSION)),
                    self._kept(path) if self._keep else {},
                )

    def _kept(self, path: Path) -> dict[str, Any] | None:
        data = _content(_beside(path, METADATA_EXTENSION))
        try:
            found = json.loads(data or b"{}")
            return {name: found[name] for name in self._keep if name in found}
        except (ValueError, TypeError):
            return None


class TableSource:
    """The rows of metadata.jsonl or metadata.csv, in their order; a column has the images' paths."""

    has_unique_names = False

    def __init__(self, table: Path, columns: Columns) -> None:
        self._table = table
        first = next(self._lines(), {})
        self._image = chosen(columns.image, PATH_COLUMNS, list(first), "image", table)
        self._caption = chosen(columns.caption, CAPTION_COLUMNS, list(first), "caption", table)
        self._keep = tuple(chosen(name, (), list(first), "keep", table) for name in columns.keep)
        self.num_rows: int | None = None

    def content(self) -> str:
        """See `Source`."""
        digest, num_rows = hashlib.sha256(), 0
        for line in _scanned(self._lines()):
            num_rows += 1
            values = [line.get(name) for name in (self._image, self._caption, *self._keep)]
            digest.update(json.dumps(values).encode())
            digest.update(_version(self._path(line)))
        self.num_rows = num_rows
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """See `Source`."""
        for line in self._lines():
            kept = {name: line[name] for name in self._keep if name in line}
            name = os.path.relpath(self._path(line), self._table.parent)
            yield Row(name, _content(self._path(line)), line.get(self._caption), kept)

    def _path(self, line: Mapping[str, Any]) -> Path:
        return self._table.parent / str(line.get(self._image))

    def _lines(self) -> Iterator[Mapping[str, Any]]:
        try:
            with open(self._table, encoding="utf-8-sig", newline="") as file:
                if self._table.suffix == ".csv":
                    yield from csv.DictReader(file)
                    return
                for line in file:
                    if line.strip():
                        values = json.loads(line)
                        if not isinstance(values, dict):
                            raise DataError(
                                f"{self._table} must have one object a line: "
                                '{"file_name": "a.jpg", "text": "a caption"}'
                            )
                        yield values
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{self._table} cannot be read: {error}") from error


def chosen(
    wanted: str | None, usual: Sequence[str], present: Sequence[str], kind: str, where: str | Path
) -> str:
    """Name of the column that holds one kind of thing.

    Raises:
        ConfigError: it is not there.
    """
    name = wanted or next((name for name in usual if name in present), usual[0])
    if name not in present:
        columns = ", ".join(present) or "no rows"
        raise ConfigError(f"{where} has no column {name}; it has {columns}: give {COLUMN_NAMES[kind]}")
    return name


def walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their paths' parts, without hidden ones; links to folders are not
    followed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
    for name, is_folder in found:
        if is_folder:
            yield from walk(folder / name)
        else:
            yield folder / name


def extension(name: str) -> str:
    """What follows the last dot, in lower case."""
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _scanned(items: Iterator[Any]) -> Iterator[Any]:
    """The items, with a bar: the pass over a source that finds out its size and whether it has changed."""
    return iter(tqdm(items, desc="scan", unit="file", disable=None))


def _beside(path: Path, other_extension: str) -> Path:
    return path.with_suffix(f".{other_extension}")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (OSError, ValueError):  # ValueError: a table's text that no file system takes for a name
        return None


def _version(path: Path) -> bytes:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return b"-"
    return f"{status.st_size} {status.st_mtime_ns};".encode()
