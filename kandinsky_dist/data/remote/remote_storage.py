"""Shards on a web server or in a bucket: what will be read is fetched in advance, neighbours together."""

import os
import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.remote.cache import BlockCache
from kandinsky_dist.data.remote.fetch import Fetcher
from kandinsky_dist.data.remote.read_ahead import NUM_THREADS, ReadAhead, Run
from kandinsky_dist.data.remote.sidecars import Sidecars
from kandinsky_dist.data.shard_index import Places
from kandinsky_dist.data.storage import MAX_GAP_BYTES, LocalStorage, Sample, Storage, check, runs_of, wanted
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError, SampleError

MIN_RUN_BYTES = 2**20
MAX_RUN_BYTES = 16 * 2**20


def make_storage(
    manifest: Manifest, *, read_ahead_bytes: int, cache_dir: Path | None, cache_bytes: int
) -> Storage:
    """The storage that a corpus needs.

    Args:
        manifest: of the corpus.
        read_ahead_bytes: of remote shards, held by each process.
        cache_dir: folder for blocks of remote shards, on a disk of this machine; None keeps none.
        cache_bytes: of all that is kept there.
    """
    if not any(is_remote(manifest.tar(shard)) for shard in range(len(manifest))):
        return LocalStorage(manifest)
    cache = BlockCache(cache_dir, cache_bytes) if cache_dir is not None and cache_bytes > 0 else None
    return RemoteStorage(manifest, read_ahead_bytes=read_ahead_bytes, cache=cache)


class RemoteStorage:
    """Shards of which some or all are remote. Local ones are read as `LocalStorage` does.

    For several threads; what it holds is made anew in another process.

    Attributes:
        read_ahead_bytes: how much of the order `expect` should be told in advance.

    Args:
        manifest: of the corpus.
        read_ahead_bytes: at most so much is fetched and not yet read; 0: every sample when it is read.
        cache: of blocks, on a local disk.
        fetcher: that gets the objects.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        read_ahead_bytes: int,
        cache: BlockCache | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.read_ahead_bytes = read_ahead_bytes
        self._objects = _Objects(manifest, cache, fetcher or Fetcher())
        self._manifest = manifest
        self._local = LocalStorage(manifest)
        # So many requests at a time are of use only if they fit into what may be held.
        self._run_bytes = min(MAX_RUN_BYTES, max(MIN_RUN_BYTES, read_ahead_bytes // NUM_THREADS))
        self._finalizer: weakref.finalize | None = None
        self._renew()
        _storages.add(self)

    def expect(self, places: Sequence[Place], extensions: Container[str] | None = None) -> None:
        """Begins to fetch samples that will be read next; see `Storage.expect`.

        What cannot be found out or fetched now is an error of the `read` that needs it.
        """
        if self.read_ahead_bytes <= 0:
            return
        remote = {shard for shard in {place.shard for place in places} if self._is_remote(shard)}
        unusable = self._sidecars.prefetch(sorted(remote))
        spans = []
        for turn, place in enumerate(places):
            if place.shard not in remote or place.shard in unusable:
                continue
            try:
                index, row = self._sidecars.find(place)
            except DataError:
                unusable.add(place.shard)
                continue
            for start, end in runs_of(wanted(index.members(row), extensions), MAX_GAP_BYTES):
                if start < end:
                    spans.append(_Span(place.shard, start, end, turn))
        runs_by_turn: dict[int, list[Run]] = {}
        first_turns = {}
        for group in _coalesced(spans, self._run_bytes):
            index = self._sidecars.index(group[0].shard)
            run = self._objects.run(group, index.metadata.get("etag"))
            first_turns[run] = min(span.turn for span in group)
            for turn in {span.turn for span in group}:
                runs_by_turn.setdefault(turn, []).append(run)
        with self._lock:
            for turn, runs in runs_by_turn.items():
                self._expected.setdefault(places[turn], []).append(runs)
        self._ahead.add(sorted(first_turns, key=first_turns.__getitem__))

    def read(self, place: Place, extensions: Container[str] | None = None) -> Sample:
        """Reads a sample; see `Storage.read`. One that was not expected is fetched by itself."""
        if not self._is_remote(place.shard):
            return self._local.read(place, extensions)
        runs = self._taken(place)
        try:
            index, row = self._sidecars.find(place)
            key, places = index.keys_N[row], wanted(index.members(row), extensions)
            fetched = [
                (run.start, self._ahead.result(run))
                for run in runs
                if any(_covers(run, *member) for member in places.values())
            ]
        finally:
            for run in runs:
                self._ahead.release(run)
        name, etag = self._manifest.name(place.shard, key), index.metadata.get("etag")
        covered = {
            extension for extension, member in places.items() if any(_covers(run, *member) for run in runs)
        }
        rest = {extension: member for extension, member in places.items() if extension not in covered}
        for start, end in runs_of(rest, MAX_GAP_BYTES):
            fetched.append((start, self._objects.read(place.shard, start, end - start, etag)))
        members = _cut(places, fetched)
        try:
            check(members, index.checksums(row), name)
        except SampleError:
            # The server may be right, and the way here or a cached block wrong: only its own word counts.
            again = [
                (start, self._objects.read(place.shard, start, end - start, etag, is_cached=False))
                for start, end in runs_of(places, MAX_GAP_BYTES)
            ]
            members = _cut(places, again)
            check(members, index.checksums(row), name)
        return Sample(key, members)

    def _is_remote(self, shard: int) -> bool:
        return is_remote(self._manifest.tar(shard))

    def _taken(self, place: Place) -> list[Run]:
        """The runs that were fetched for a sample, each of them for it alone or others too."""
        with self._lock:
            found = self._expected.get(place)
            if not found:
                return []
            runs = found.pop(0)
            if not found:
                del self._expected[place]
            return runs

    def _renew(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._lock = Lock()
        self._expected: dict[Place, list[list[Run]]] = {}
        self._sidecars = Sidecars(self._manifest, self._objects.fetcher)
        self._ahead = ReadAhead(self.read_ahead_bytes)
        # Threads know the object that they work for, not this one, so that they end with it.
        self._finalizer = weakref.finalize(self, self._ahead.close)
        self._finalizer.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {
            "manifest": self._manifest,
            "read_ahead_bytes": self.read_ahead_bytes,
            "cache": self._objects.cache,
            "fetcher": self._objects.fetcher,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass(frozen=True)
class _Span:
    """Bytes of one sample, which is the turn-th that is expected."""

    shard: int
    start: int
    end: int
    turn: int


def _coalesced(spans: Iterable[_Span], max_bytes: int) -> list[list[_Span]]:
    """Groups of spans that lie close together in a shard, none longer than so many bytes if it can be."""
    groups: list[list[_Span]] = []
    start = end = 0
    for span in sorted(spans, key=lambda span: (span.shard, span.start, span.end)):
        joins = (
            groups
            and span.shard == groups[-1][0].shard
            and span.start - end <= MAX_GAP_BYTES
            and max(end, span.end) - start <= max_bytes
        )
        if joins:
            groups[-1].append(span)
            end = max(end, span.end)
        else:
            groups.append([span])
            start, end = span.start, span.end
    return groups


def _covers(run: Run, offset: int, size: int) -> bool:
    return run.start <= offset and offset + size <= run.end


def _cut(places: Places, fetched: Sequence[tuple[int, bytes]]) -> dict[str, bytes]:
    """Members out of stretches of a tar, given by where they start."""
    return {
        extension: next(
            data[offset - start : offset - start + size]
            for start, data in fetched
            if start <= offset and offset + size <= start + len(data)
        )
        for extension, (offset, size) in places.items()
    }


@dataclass
class _Objects:
    """Bytes of remote tars, through the cache if there is one."""

    manifest: Manifest
    cache: BlockCache | None
    fetcher: Fetcher

    def run(self, group: Sequence[_Span], etag: str | None) -> Run:
        """The run that covers some spans of a shard."""
        start, end = group[0].start, max(span.end for span in group)
        num_readers = len({span.turn for span in group})
        return Run(start, end, num_readers, partial(self.read, group[0].shard, start, end - start, etag))

    def read(self, shard: int, start: int, size: int, etag: str | None, *, is_cached: bool = True) -> bytes:
        """Some bytes of a shard's tar; raises as `Fetcher.fetch` does."""
        location, num_bytes = self.manifest.tar(shard), int(self.manifest.num_bytes_S[shard])
        fetch = partial(self.fetcher.fetch, location, expected_bytes=num_bytes, etag=etag)
        if self.cache is None or not is_cached or size == 0:
            return fetch(start, size)
        block_bytes = self.cache.block_bytes
        version = self.manifest.fingerprints_SF[shard].tobytes().hex()
        parts = []
        for block in range(start // block_bytes, -(-(start + size) // block_bytes)):
            first = block * block_bytes
            whole = partial(fetch, first, min(block_bytes, num_bytes - first))
            begin, end = max(0, start - first), min(block_bytes, start + size - first)
            parts.append(self.cache.get(location, version, block, whole, begin, end))
        return parts[0] if len(parts) == 1 else b"".join(parts)


_storages: "weakref.WeakSet[RemoteStorage]" = weakref.WeakSet()


def _renew_all() -> None:
    for storage in list(_storages):
        storage._renew()


# Threads do not live on in a forked process, and what they were about to fetch nobody would.
os.register_at_fork(after_in_child=_renew_all)
