"""Open sidecars for the threads of a process, remote ones among them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread

from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.remote.fetch import Fetcher
from kandinsky_dist.data.shard_index import ShardIndex
from kandinsky_dist.data.tables import Place, Tables

MAX_BYTES = 256 * 2**20
"""Content of remote sidecars that a process keeps: about 1 MB for a shard of 10,000 samples."""
NUM_THREADS = 16


@dataclass
class Sidecars:
    """Open sidecars, for several threads; the content of remote ones is fetched several at a time."""

    manifest: Manifest
    fetcher: Fetcher
    _lock: Lock = field(default_factory=Lock)
    _contents: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    _num_bytes: int = 0

    def __post_init__(self) -> None:
        self._tables = Tables(self.manifest, self._content)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; raises as `Tables` does."""
        with self._lock:
            return self._tables[shard].index

    def find(self, place: Place) -> tuple[ShardIndex, int]:
        """The index of a sample's shard, and its row there; raises as `Tables` does."""
        with self._lock:
            table = self._tables[place.shard]
            return table.index, table.row(place)

    def prefetch(self, shards: Sequence[int]) -> set[int]:
        """Fetches remote sidecars that are not there yet; the shards whose sidecars cannot be had."""
        with self._lock:
            locations = {shard: self.manifest.sidecar(shard) for shard in shards}
            missing = [
                shard for shard, name in locations.items() if is_remote(name) and name not in self._contents
            ]
        failed: set[int] = set()
        remaining = iter(missing)

        def work() -> None:
            while True:
                with self._lock:
                    shard = next(remaining, None)
                if shard is None:
                    return
                try:
                    content = self.fetcher.fetch_whole(locations[shard])
                except Exception:  # whoever reads the shard will meet it again
                    failed.add(shard)
                    continue
                with self._lock:
                    self._keep(locations[shard], content)

        threads = [Thread(target=work, daemon=True) for _ in range(min(NUM_THREADS, len(missing)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failed

    def _content(self, location: str) -> bytes:
        """For `Tables`, which is asked under the lock."""
        if location not in self._contents:
            self._keep(location, self.fetcher.fetch_whole(location))
        self._contents.move_to_end(location)
        return self._contents[location]

    def _keep(self, location: str, content: bytes) -> None:
        self._num_bytes += len(content) - len(self._contents.get(location, b""))
        self._contents[location] = content
        while self._num_bytes > MAX_BYTES and len(self._contents) > 1:
            self._num_bytes -= len(self._contents.popitem(last=False)[1])
