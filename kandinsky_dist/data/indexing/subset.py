"""A corpus of some samples of another: a manifest alone, tars and sidecars stay where they are."""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kandinsky_dist.data.aspects import NUM_ASPECTS
from kandinsky_dist.data.cache_description import CACHE_NAME, description_content
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.locations import Texts, is_remote, relative
from kandinsky_dist.data.manifest import Manifest, write_manifest
from kandinsky_dist.data.origin import existing_result, result_folder
from kandinsky_dist.data.shard_index import CAPTION_EXTENSION, ShardIndex
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place, Tables
from kandinsky_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What samples must be like; None asks nothing.

    Attributes:
        min_side: of the image's shorter side, pixels.
        min_pixels: width times height.
        min_aspect, max_aspect: width over height.
        min_caption_length, max_caption_length: of the .txt member, bytes of UTF-8: no caption is read.
        caption_matches: regular expression that is found somewhere in the .txt; captions are read.
        limit: so many samples, the first ones that fit.
    """

    min_side: int | None = None
    min_pixels: int | None = None
    min_aspect: float | None = None
    max_aspect: float | None = None
    min_caption_length: int | None = None
    max_caption_length: int | None = None
    caption_matches: str | None = None
    limit: int | None = None

    @property
    def needs_size(self) -> bool:
        """Whether images of unknown size cannot be judged."""
        return any(
            bound is not None for bound in (self.min_side, self.min_pixels, self.min_aspect, self.max_aspect)
        )

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ConfigError: nothing is asked, a number out of range, or an expression that is none.
        """
        asked = {name: value for name, value in asdict(self).items() if value is not None}
        if not asked:
            raise ConfigError("a subset needs at least one condition, such as --min-side or --limit")
        for name, value in asked.items():
            if not isinstance(value, str) and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0")
        for low, high in (("min_aspect", "max_aspect"), ("min_caption_length", "max_caption_length")):
            if low in asked and high in asked and asked[low] > asked[high]:
                raise ConfigError(f"{low}={asked[low]} is above {high}={asked[high]}: no sample can be both")
        if self.caption_matches is not None:
            try:
                re.compile(self.caption_matches)
            except re.error as error:
                raise ConfigError(
                    f"caption_matches={self.caption_matches!r} is no regular expression: {error}"
                ) from error


def make_subset(
    shards: str,
    out: Path,
    *,
    min_side: int | None = None,
    min_pixels: int | None = None,
    min_aspect: float | None = None,
    max_aspect: float | None = None,
    min_caption_length: int | None = None,
    max_caption_length: int | None = None,
    caption_matches: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Writes the manifest of the samples that fit into a folder of its own; see `Filters`.

    Images of unknown size do not fit where a size or shape is asked for. All shards keep their row, so that a
    subset of a subset, and the same one of a grown corpus, number them alike. The result of an equal call is
    kept.

    Args:
        shards: as data.shards, indexed.
        out: folder to make.
        progress: show a bar on stderr when that is a terminal.

    Raises:
        ConfigError: filters that cannot be meant, or `out` holds something else.
        DataError: shards that are not indexed or cannot be read; no sample fits.
    """
    filters = Filters(
        min_side=min_side,
        min_pixels=min_pixels,
        min_aspect=min_aspect,
        max_aspect=max_aspect,
        min_caption_length=min_caption_length,
        max_caption_length=max_caption_length,
        caption_matches=caption_matches,
        limit=limit,
    )
    filters.check()
    corpus = read_manifest(shards, "shards")
    origin = {"command": "subset", "corpus": corpus.fingerprint, **asdict(filters)}
    present = existing_result(out, origin)
    if present is not None:
        return present
    rows, aspect_counts, num_unknown = _select(corpus, filters, progress)
    if num_unknown:
        logger.warning("%d samples left out: the size of their image is not known", num_unknown)
    selected_N = np.concatenate(rows).astype(np.uint32)
    if len(selected_N) == 0:
        raise DataError(f"shards={shards}: none of {corpus.num_samples:,} samples fits; relax the conditions")
    numbers = range(len(corpus))
    manifest = replace(
        corpus,
        root=str(out),
        tars=Texts.of([relative(corpus.tar(shard), out) for shard in numbers]),
        sidecars=Texts.of([relative(corpus.sidecar(shard), out) for shard in numbers]),
        num_samples_S=np.array([len(found) for found in rows], np.int64),
        aspect_counts_SA=np.stack(aspect_counts),
        selected_N=selected_N,
    )
    description = description_content(shards, "shards")
    with result_folder(out, origin) as folder:
        if description is not None:
            (folder / CACHE_NAME).write_bytes(description)
        write_manifest(folder, manifest)
    return manifest


def _select(
    corpus: Manifest, filters: Filters, progress: bool
) -> tuple[list[npt.NDArray[np.integer]], list[npt.NDArray[np.int64]], int]:
    """Rows of each shard that fit, their aspect counts, and how many are of unknown size."""
    fetch: Callable[[str], bytes] | None = None
    if any(is_remote(location) for location in (corpus.root, *corpus.sidecars)):
        from kandinsky_dist.data.remote.fetch import fetch_whole as fetch
    matches = _matcher(corpus, filters)
    tables = Tables(corpus, fetch)
    left = filters.limit
    rows_of: list[npt.NDArray[np.integer]] = []
    aspect_counts, num_unknown = [], 0
    shards = tqdm(range(len(corpus)), desc="subset", unit="shard", disable=None if progress else True)
    for shard in shards:
        if left == 0 or corpus.num_samples_S[shard] == 0:
            rows_of.append(np.zeros(0, np.uint32))
            aspect_counts.append(np.zeros(NUM_ASPECTS, np.int64))
            continue
        index = tables[shard].index
        selected = corpus.selected(shard)
        candidates = np.arange(len(index)) if selected is None else np.asarray(selected)
        if filters.needs_size:
            num_unknown += int((index.widths_N[candidates] <= 0).sum())
        fits = _fits(index, filters)[candidates]
        if matches is not None:
            for place in np.flatnonzero(fits):
                fits[place] = matches(Place(shard, int(place)))
        rows = candidates[fits][:left]
        left = None if left is None else left - len(rows)
        rows_of.append(rows)
        aspect_counts.append(np.bincount(index.aspects_N[rows], minlength=NUM_ASPECTS).astype(np.int64))
    return rows_of, aspect_counts, num_unknown


def _fits(index: ShardIndex, filters: Filters) -> npt.NDArray[np.bool_]:
    """Which samples of a shard fit, by its sidecar alone."""
    widths, heights = index.widths_N.astype(np.int64), index.heights_N.astype(np.int64)
    fits = np.ones(len(index), bool)
    if filters.needs_size:
        fits &= (widths > 0) & (heights > 0)
    if filters.min_side is not None:
        fits &= np.minimum(widths, heights) >= filters.min_side
    if filters.min_pixels is not None:
        fits &= widths * heights >= filters.min_pixels
    if filters.min_aspect is not None:
        fits &= widths >= filters.min_aspect * heights
    if filters.max_aspect is not None:
        fits &= widths <= filters.max_aspect * heights
    bounds = (filters.min_caption_length, filters.max_caption_length)
    if bounds != (None, None) or filters.caption_matches is not None:
        if CAPTION_EXTENSION not in index.extensions:
            return np.zeros(len(index), bool)
        column = index.extensions.index(CAPTION_EXTENSION)
        lengths = index.sizes_NE[:, column]
        fits &= index.offsets_NE[:, column] >= 0
        if filters.min_caption_length is not None:
            fits &= lengths >= filters.min_caption_length
        if filters.max_caption_length is not None:
            fits &= lengths <= filters.max_caption_length
    return fits


def _matcher(corpus: Manifest, filters: Filters) -> Callable[[Place], bool] | None:
    """Whether the caption of a sample matches; None if that is not asked."""
    if filters.caption_matches is None:
        return None
    from kandinsky_dist.data.remote.transports import redacted

    remote = next((tar for tar in map(corpus.tar, range(len(corpus))) if is_remote(tar)), None)
    if remote is not None:
        raise DataError(
            f"caption_matches={filters.caption_matches!r} would read every caption from a server "
            f"({redacted(remote)}); copy the shards to a disk"
        )
    expression = re.compile(filters.caption_matches)
    storage = LocalStorage(corpus)

    def matches(place: Place) -> bool:
        caption = storage.read(place, (CAPTION_EXTENSION,)).members[CAPTION_EXTENSION]
        return expression.search(caption.decode("utf-8", "replace")) is not None

    return matches
