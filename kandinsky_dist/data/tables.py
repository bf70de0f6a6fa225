"""Open sidecars of a corpus: from a place in its order to the members of a tar."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.shard_index import ShardIndex, read_shard_index
from kandinsky_dist.errors import DataError

MAX_OPEN_SHARDS = 320
"""Lanes of a rank on its own times the chunks of a window, and some: fewer would be opened time and again."""


@dataclass(frozen=True, slots=True)
class Place:
    """A sample of a corpus: the index-th of a shard's samples, or of those in one aspect bucket."""

    shard: int
    index: int
    aspect: int = WHOLE


class Table:
    """An open sidecar, and which of its rows belong to the corpus."""

    def __init__(self, index: ShardIndex, selected: npt.NDArray[np.integer] | None) -> None:
        self.index = index
        self._selected = selected
        self._rows: dict[int, npt.NDArray[np.integer]] = {}

    def row(self, place: Place) -> int:
        """Row of the sidecar for a place."""
        if place.aspect == WHOLE:
            return place.index if self._selected is None else int(self._selected[place.index])
        if place.aspect not in self._rows:
            rows = np.arange(len(self.index)) if self._selected is None else self._selected
            self._rows[place.aspect] = rows[self.index.aspects_N[rows] == place.aspect]
        return int(self._rows[place.aspect][place.index])


class Tables:
    """The sidecars of a corpus, those last used kept open. Not for several threads at once.

    Args:
        manifest: of the corpus.
        fetch: gets the content of a sidecar that is not a local file.
    """

    def __init__(self, manifest: Manifest, fetch: Callable[[str], bytes] | None = None) -> None:
        self._manifest = manifest
        self._fetch = fetch
        self._open: OrderedDict[int, Table] = OrderedDict()

    def __getitem__(self, shard: int) -> Table:
        """The table of a shard.

        Raises:
            DataError: no sidecar, or one of another version of the shard than the manifest's.
        """
        if shard not in self._open:
            self._open[shard] = self._load(shard)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _load(self, shard: int) -> Table:
        location = self._manifest.sidecar(shard)
        remedy = f"kandinsky-dist data index {self._manifest.root or self._manifest.tar(shard)}"
        data = None
        if is_remote(location):
            assert self._fetch is not None
            data = self._fetch(location)
        index = read_shard_index(location, remedy, data)
        if index.metadata["fingerprint"] != self._manifest.fingerprints_SF[shard].tobytes().hex():
            raise DataError(f"{location} is of another version of the shard than the manifest; run: {remedy}")
        return Table(index, self._manifest.selected(shard))
