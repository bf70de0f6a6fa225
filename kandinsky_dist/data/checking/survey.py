"""A look at some shards of a corpus, through the code that training reads it with.

Letters of shapes: N samples, E extensions, S shards.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.aspects import NUM_ASPECTS
from kandinsky_dist.data.captions import Captions
from kandinsky_dist.data.checking.statistics import Histogram, prints_of
from kandinsky_dist.data.decode import Wanted, decode_views
from kandinsky_dist.data.indexing.samples import CACHED_EXTENSION
from kandinsky_dist.data.indexing.tar_readers import open_reader
from kandinsky_dist.data.indexing.tarwalk import walk_tar
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.shard_index import IMAGE_EXTENSIONS, ShardIndex
from kandinsky_dist.data.storage import LocalStorage, Sample, Storage
from kandinsky_dist.data.tables import Place, Tables
from kandinsky_dist.errors import DataError, SampleError

READ_AHEAD_BYTES = 64 * 2**20
"""Of remote shards, in each process."""


@dataclass(frozen=True)
class Scope:
    """What is looked at.

    Attributes:
        wanted: views that images are decoded to.
        captions: which caption a sample has.
        one_in: kinds of content of which one is compared, see `prints_of`.
        keeps_captions: whether captions are handed back.
    """

    wanted: Wanted
    captions: Captions
    one_in: int
    keeps_captions: bool


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be used, and the line that says why."""

    shard: str
    key: str
    reason: str
    error: str


@dataclass
class Findings:
    """What a look at some shards has found; two can be put together.

    Attributes:
        members: samples that have a member of each extension.
        short_sides, long_sides: of images of known size, pixels.
        image_prints, caption_prints: what members are compared by.
        num_unprinted: images whose CRC-32 the index does not have.
        num_left_out: by indexing, for what they lack.
        disagreeing: lines about shards that are not what was indexed.
        num_read: samples that were read, as in training.
        seconds: that reading took, over all processes.
        caption_characters: of captions that were read.
        read_captions: the captions themselves, if they are wanted.
    """

    image_bytes: Histogram = field(default_factory=Histogram)
    caption_bytes: Histogram = field(default_factory=Histogram)
    short_sides: Histogram = field(default_factory=Histogram)
    long_sides: Histogram = field(default_factory=Histogram)
    members: Counter[str] = field(default_factory=Counter)
    aspect_counts_A: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_ASPECTS, np.int64))
    num_unknown_sizes: int = 0
    image_prints: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    caption_prints: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    num_unprinted: int = 0
    num_left_out: Counter[str] = field(default_factory=Counter)
    first_left_out: str = ""
    disagreeing: list[str] = field(default_factory=list)
    num_read: int = 0
    seconds: float = 0.0
    caption_characters: Histogram = field(default_factory=Histogram)
    read_captions: list[str] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)

    def merge(self, other: "Findings") -> None:
        """Adds what another look has found."""
        for name in ("image_bytes", "caption_bytes", "short_sides", "long_sides", "caption_characters"):
            getattr(self, name).merge(getattr(other, name))
        self.members.update(other.members)
        self.num_left_out.update(other.num_left_out)
        self.aspect_counts_A = self.aspect_counts_A + other.aspect_counts_A
        self.num_unknown_sizes += other.num_unknown_sizes
        self.num_unprinted += other.num_unprinted
        self.num_read += other.num_read
        self.seconds += other.seconds
        self.first_left_out = self.first_left_out or other.first_left_out
        self.image_prints += other.image_prints
        self.caption_prints += other.caption_prints
        self.disagreeing += other.disagreeing
        self.read_captions += other.read_captions
        self.unreadable += other.unreadable


class Surveyor:
    """Looks at shards of one corpus.

    Args:
        manifest: of the corpus.
        scope: what is looked at.
    """

    def __init__(self, manifest: Manifest, scope: Scope) -> None:
        self._manifest = manifest
        self._scope = scope
        self._storage, self._tables = _opened(manifest)
        self._extensions = frozenset((*IMAGE_EXTENSIONS, CACHED_EXTENSION, *scope.captions.extensions))

    def survey(self, shard: int, indices: Sequence[int], first_position: int) -> Findings:
        """Looks at the index of all of a shard's samples, and reads some of them.

        Args:
            shard: its number.
            indices: numbers of the samples to read.
            first_position: number of the shard's first sample in the corpus.
        """
        findings = Findings()
        try:
            index = self._tables[shard].index
            self._count(shard, index, findings)
            self._compare(shard, index)
            self._read(shard, indices, first_position, findings)
        except DataError as error:
            findings.disagreeing.append(str(error))
        return findings

    def _count(self, shard: int, index: ShardIndex, findings: Findings) -> None:
        """What the index says of the samples, without their bytes."""
        selected = self._manifest.selected(shard)
        rows = np.arange(len(index)) if selected is None else selected
        has_NE = index.offsets_NE[rows] >= 0
        findings.members.update(dict(zip(index.extensions, has_NE.sum(0).tolist(), strict=True)))
        image_N = _first_of(IMAGE_EXTENSIONS, index.extensions, has_NE)
        caption_N = _first_of(sorted(self._scope.captions.extensions), index.extensions, has_NE)
        for column_N, sizes, prints in (
            (image_N, findings.image_bytes, findings.image_prints),
            (caption_N, findings.caption_bytes, findings.caption_prints),
        ):
            there = column_N >= 0
            sizes_N = index.sizes_NE[rows[there], column_N[there]]
            checksums_N = index.checksums_NE[rows[there], column_N[there]]
            sizes.add(sizes_N)
            prints.append(prints_of(checksums_N, sizes_N, self._scope.one_in))
            if prints is findings.image_prints:
                findings.num_unprinted += int((checksums_N < 0).sum())
        widths_N, heights_N = index.widths_N[rows], index.heights_N[rows]
        known = (widths_N > 0) & (heights_N > 0)
        findings.short_sides.add(np.minimum(widths_N, heights_N)[known])
        findings.long_sides.add(np.maximum(widths_N, heights_N)[known])
        findings.num_unknown_sizes += int((image_N >= 0).sum() - known.sum())
        findings.aspect_counts_A = np.bincount(index.aspects_N[rows[known]], minlength=NUM_ASPECTS)
        for reason in ("image", "caption"):
            findings.num_left_out[reason] += int(index.metadata.get(f"num_without_{reason}", 0))
        findings.first_left_out = index.metadata.get("first_left_out", "")

    def _compare(self, shard: int, index: ShardIndex) -> None:
        """Makes sure, by headers, that a local shard is the one that was indexed.

        Raises:
            DataError: it is gone or another one. Of a remote shard the storage says so itself.
        """
        tar = self._manifest.tar(shard)
        if is_remote(tar):
            return
        try:
            status = os.stat(tar)
        except OSError as error:
            raise DataError(f"{tar}: {error.strerror}, though it is in the manifest") from error
        expected = int(self._manifest.num_bytes_S[shard])
        if status.st_size != expected:
            raise DataError(
                f"{tar} has {status.st_size} bytes, its manifest says {expected}: changed or cut short"
            )
        if str(status.st_mtime_ns) != index.metadata.get("mtime_ns"):
            with open_reader(tar) as reader:
                if walk_tar(reader).fingerprint != index.metadata["fingerprint"]:
                    raise DataError(f"{tar} holds something else than was indexed, at the same length")

    def _read(self, shard: int, indices: Sequence[int], first_position: int, findings: Findings) -> None:
        places = [Place(shard, index) for index in indices]
        if self._storage.read_ahead_bytes:
            self._storage.expect(places, self._extensions)
        for place in places:
            start = perf_counter()
            try:
                self._use(place, first_position + place.index, findings)
            except SampleError as error:
                table = self._tables[shard]
                key = table.index.keys_N[table.row(place)]
                text = str(error).removeprefix(f"{self._manifest.name(shard, key)}: ")
                findings.unreadable.append(Unreadable(self._manifest.tars[shard], key, _reason(text), text))
            findings.num_read += 1
            findings.seconds += perf_counter() - start

    def _use(self, place: Place, position: int, findings: Findings) -> None:
        sample = self._storage.read(place, self._extensions)
        name = self._manifest.name(place.shard, sample.key)
        is_cached = CACHED_EXTENSION in sample.members
        if not is_cached or self._scope.captions.extensions & sample.members.keys():
            caption = self._scope.captions.choose(sample.members, position, name)
            findings.caption_characters.add([len(caption)])
            if self._scope.keeps_captions:
                findings.read_captions.append(caption)
        image = _image(sample)
        if image is not None:
            decode_views(image, name, self._scope.wanted)
        elif not is_cached:
            raise SampleError(f"{name}: has no image")


def _opened(manifest: Manifest) -> tuple[Storage, Tables]:
    places = ((manifest.tar(shard), manifest.sidecar(shard)) for shard in range(len(manifest)))
    if not any(is_remote(tar) or is_remote(sidecar) for tar, sidecar in places):
        return LocalStorage(manifest), Tables(manifest)
    from kandinsky_dist.data.remote.fetch import Fetcher
    from kandinsky_dist.data.remote.remote_storage import make_storage

    storage = make_storage(manifest, read_ahead_bytes=READ_AHEAD_BYTES, cache_dir=None, cache_bytes=0)
    return storage, Tables(manifest, Fetcher().fetch_whole)


def _first_of(
    wanted: Sequence[str], extensions: Sequence[str], has_NE: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Column of the first wanted member that each sample has, -1 for none."""
    found_N = np.full(len(has_NE), -1)
    for extension in reversed([extension for extension in wanted if extension in extensions]):
        column = extensions.index(extension)
        found_N[has_NE[:, column]] = column
    return found_N


def _image(sample: Sample) -> bytes | None:
    return next((sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None)


def _reason(text: str) -> str:
    """The kind of trouble that a line speaks of, without what is special to one sample."""
    for words, reason in (
        ("is not what was indexed", "bytes changed since indexing"),
        ("the file ends", "shard cut short"),
        ("no known format", "not an image"),
        ("cannot be decoded", "image damaged"),
        ("pixels", "image too large"),
        ("no image", "no image"),
        ("not UTF-8", "caption not UTF-8"),
        ("not JSON", "caption's JSON damaged"),
        ("no caption", "no caption"),
    ):
        if words in text:
            return reason
    return "other"
