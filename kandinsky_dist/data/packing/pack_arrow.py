"""Tables that hold the images themselves, batch by batch: parquet files and datasets of `datasets`.

Images come out as the bytes that went in: nothing here decodes one.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kandinsky_dist.data.packing.pack_sources import CAPTION_COLUMNS, Columns, Row, chosen, walk
from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.optional import require

EXTRA = "datasets"
ROWS_PER_BATCH = 64
"""Images of so many rows are in memory at a time."""
READ_BUFFER_BYTES = 2**20
READ_ERRORS = (OSError, ValueError, NotImplementedError)
"""Also of pyarrow, whose own errors derive from these."""
BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes")


class ParquetSource:
    """Rows of parquet files, in the order of the files' paths.

    Args:
        source: a file, or a folder with .parquet files anywhere below it.
        columns: the image's may hold bytes, the struct {bytes, path} of `datasets`, or paths from the folder.
    """

    has_unique_names = True

    def __init__(self, source: Path, columns: Columns) -> None:
        parquet = require("pyarrow.parquet", extra=EXTRA, why=f"packing {source}")
        self._parquet = parquet
        self._folder = source if source.is_dir() else source.parent
        self._paths = [path for path in walk(source) if is_parquet(path)] if source.is_dir() else [source]
        self._files = [self._checked(path) for path in self._paths]
        self._columns = _ArrowColumns(columns, self._checked(self._paths[0])[1], self._paths[0])
        self.num_rows: int | None = sum(num_rows for num_rows, _ in self._files)

    def content(self) -> str:
        """See `Source`."""
        return _versions(self._paths)

    def rows(self) -> Iterator[Row]:
        """See `Source`."""
        number = 0
        for path in self._paths:
            _, schema = self._checked(path)
            columns = self._columns.of(schema, path)
            try:
                # Without buffering, pyarrow would read a row group's column in one piece; so it is a page,
                # by default 1,024 images.
                file = self._parquet.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
                with file:
                    for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns.names, use_threads=False):
                        yield from columns.rows(batch, number, self._folder)
                        number += batch.num_rows
            except READ_ERRORS as error:
                raise DataError(f"{path} cannot be read: {_one_line(error)}") from error

    def _checked(self, path: Path) -> tuple[int, Any]:
        try:
            with self._parquet.ParquetFile(path) as file:
                return file.metadata.num_rows, file.schema_arrow
        except READ_ERRORS as error:
            raise DataError(f"{path} is not a whole parquet file ({_one_line(error)})") from error


class SavedDataset:
    """A folder that `datasets` wrote with save_to_disk."""

    has_unique_names = True

    def __init__(self, folder: Path, columns: Columns, split: str | None) -> None:
        datasets = require("datasets", extra=EXTRA, why=f"packing {folder}")
        self._folder = folder
        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:  # of the library, pyarrow or JSON: all of it means a damaged folder
            raise DataError(f"{folder} cannot be read as a saved dataset: {_one_line(error)}") from error
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[_chosen_split(split, list(dataset), folder)]
        elif split is not None and str(dataset.split) != split:
            raise ConfigError(f"--split {split}: {folder} is one dataset without splits; leave --split out")
        self._dataset = dataset
        schema = dataset.with_format("arrow").features.arrow_schema
        self._columns = _ArrowColumns(columns, schema, folder, dataset.features)
        self.num_rows: int | None = len(dataset)

    def content(self) -> str:
        """See `Source`."""
        return _versions([path for path in walk(self._folder) if path.is_file()])

    def rows(self) -> Iterator[Row]:
        """See `Source`."""
        return _rows(self._dataset, self._columns, self._folder)


class HubDataset:
    """A dataset of the Hugging Face hub (or a local folder that `datasets` can load), streamed."""

    has_unique_names = True

    def __init__(self, name: str, columns: Columns, split: str | None, subset: str | None) -> None:
        datasets = require("datasets", extra=EXTRA, why=f"{name}, no path here but perhaps on the hub,")
        try:
            self._builder = datasets.load_dataset_builder(name, subset)
            splits = self._builder.as_streaming_dataset()
            split = _chosen_split(split, list(splits), name)
            dataset = splits[split]
            if dataset.features is None:
                dataset = dataset._resolve_features()
        except ConfigError:
            raise
        except Exception as error:  # no network, no such name, no right to it, no such subset ...
            raise ConfigError(
                f"{name} is neither a path here nor a dataset that the hub gives: {_one_line(error)}"
            ) from error
        self._name, self._split, self._dataset = name, split, dataset
        self._columns = _ArrowColumns(columns, dataset.features.arrow_schema, name, dataset.features)
        known = self._builder.info.splits
        self.num_rows: int | None = known[split].num_examples if known and split in known else None

    def content(self) -> str:
        """The commit on the hub, subset and split."""
        return f"{self._builder.hash} {self._builder.config.name} {self._split}"

    def rows(self) -> Iterator[Row]:
        """See `Source`."""
        try:
            yield from _rows(self._dataset, self._columns, None)
        except READ_ERRORS as error:
            raise DataError(f"{self._name}: cannot be read on: {_one_line(error)}") from error


def is_parquet(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() == ".parquet"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


class _ArrowColumns:
    """The columns of an arrow table that are packed.

    Raises:
        ConfigError: one is not there, or holds something else than it should.
    """

    def __init__(self, columns: Columns, schema: Any, where: str | Path, features: Any = None) -> None:
        present = list(schema.names)
        usual = [name for name in BYTES_COLUMNS if name in present and _holds_images(schema.field(name).type)]
        self.image = chosen(columns.image, usual or BYTES_COLUMNS, present, "image", where)
        self.caption = chosen(columns.caption, CAPTION_COLUMNS, present, "caption", where)
        self.keep = tuple(chosen(name, (), present, "keep", where) for name in columns.keep)
        self.names = list(dict.fromkeys((self.image, self.caption, *self.keep)))
        self._class_names = getattr(features[self.caption], "names", None) if features is not None else None
        self._check(schema, where)

    def of(self, schema: Any, where: Path) -> "_ArrowColumns":
        """These columns, checked to be in another file too."""
        for name in self.names:
            chosen(name, (), schema.names, "keep" if name in self.keep else "image", where)
        self._check(schema, where)
        return self

    def rows(self, batch: Any, first: int, folder: Path | None) -> Iterator[Row]:
        """The rows of a batch whose first one has a number."""
        images, captions = batch.column(self.image), batch.column(self.caption)
        kept = [(name, batch.column(name)) for name in self.keep]
        for row in range(batch.num_rows):
            caption = _text(captions[row])
            if self._class_names is not None and caption is not None:
                caption = self._class_names[caption]
            yield Row(
                f"{first + row:09d}",
                _image(images[row].as_py(), folder),
                caption,
                {name: column[row].as_py() for name, column in kept},
            )

    def _check(self, schema: Any, where: str | Path) -> None:
        types = {name: schema.field(name).type for name in self.names}
        if not _holds_images(types[self.image]):
            raise ConfigError(
                f"{where}: column {self.image} holds {types[self.image]}, not bytes, {{bytes, path}} or "
                "paths; give --image-column"
            )
        if not _holds_text(types[self.caption]) and self._class_names is None:
            raise ConfigError(
                f"{where}: column {self.caption} holds {types[self.caption]}, not text; give --caption-column"
            )
        for name in self.keep:
            if "binary" in str(types[name]):
                raise ConfigError(
                    f"{where}: column {name} holds bytes, which a .json cannot; "
                    "leave it out of --keep-columns"
                )


def _text(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _rows(dataset: Any, columns: _ArrowColumns, folder: Path | None) -> Iterator[Row]:
    number = 0
    # Tables of arrow have the bytes as they are stored: the image feature decodes only in other formats.
    for table in dataset.select_columns(columns.names).with_format("arrow").iter(ROWS_PER_BATCH):
        yield from columns.rows(table, number, folder)
        number += table.num_rows


def _image(value: Any, folder: Path | None) -> bytes | None:
    """Content of an image as a column has it: bytes, {bytes, path}, or a path from the source's folder."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    try:
        if folder is None and "://" in value:  # a file of the hub that `datasets` names by its address
            with require("fsspec", extra=EXTRA, why=f"reading {value}").open(value, "rb") as file:
                data: bytes = file.read()
                return data
        return ((folder or Path()) / value).read_bytes()
    except (OSError, ValueError):
        return None


def _holds_images(arrow_type: Any) -> bool:
    text = str(arrow_type)
    if text.startswith("struct<"):
        return any(field.name == "bytes" and "binary" in str(field.type) for field in arrow_type)
    return "binary" in text.partition("<")[0] or _is_text(text)


def _holds_text(arrow_type: Any) -> bool:
    text = str(arrow_type)
    is_list = text.startswith(("list<", "large_list<")) and "string" in text and "struct" not in text
    return _is_text(text) or is_list or text in ("binary", "large_binary")


def _is_text(text: str) -> bool:
    return text in ("string", "large_string", "string_view") or text.startswith("dictionary<values=string")


def _chosen_split(split: str | None, present: Sequence[str], where: str | Path) -> str:
    if split is None and len(present) == 1:
        return present[0]
    if split is None or split not in present:
        seen = "no --split given" if split is None else f"--split {split}"
        raise ConfigError(f"{seen}: {where} has {', '.join(present)}; give one of them")
    return split


def _versions(paths: Sequence[Path]) -> str:
    status = [(path, path.stat()) for path in paths]
    texts = [[os.fspath(path), state.st_size, state.st_mtime_ns] for path, state in status]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
