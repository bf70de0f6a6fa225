"""Tars without a manifest: the webdataset library's own pipeline, in random order and without end.

There is no place in such a stream to come back to. A run on one says so when it starts, and a checkpoint of
it is not resumed unless the run is told to go on with other samples.
"""

import logging
import shlex
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import webdataset
from webdataset import tariterators
from webdataset.gopen import gopen_pipe

from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.order import NUM_ATTEMPTS
from kandinsky_dist.data.patterns import expand_braces, resolve_shards
from kandinsky_dist.data.rows import Rows, Views
from kandinsky_dist.data.storage import Sample
from kandinsky_dist.errors import ConfigError, DataError, SampleError

PIPE = "pipe:"
SHUFFLE_SAMPLES = 1000
MAX_FAILED_SHARDS = 10
"""Shards in a row from which no sample comes: then it is not the shards."""

logger = logging.getLogger(__name__)


class StreamDataset:
    """Samples of an endless stream; positions only number them, for noise and dropout.

    Args:
        shards: as data.shards, but for a manifest; or "pipe:COMMAND", a shell command that writes a tar,
            with braces for several.
        views: what is wanted of each sample.
        allow_pipe: whether commands may be run.

    Raises:
        ConfigError: a command that is not allowed.
        DataError: no such shards.
    """

    num_samples: int | None = None
    in_process = False

    def __init__(self, shards: str, views: Views, *, allow_pipe: bool) -> None:
        is_pipe = shards.startswith(PIPE)
        if is_pipe and not allow_pipe:
            raise ConfigError("data.shards=pipe:... runs a shell command: allow it with data.allow_pipe=true")
        self._urls = expand_braces(shards) if is_pipe else resolve_shards(shards, "data.shards")
        self._views = views

    def batches(
        self,
        lists: Iterable[Sequence[int]],
        num_threads: int,
    ) -> Generator[Batch, None, None]:
        """Batches that bear the positions of some lists. The samples are drawn anew each time.

        Raises:
            DataError: nothing can be read from the shards.
        """
        samples = self._samples()
        for positions in lists:
            rows, bad = Rows(self._views, np.asarray(positions, np.int64), WHOLE), list[BadSample]()
            for row, position in enumerate(positions):
                bad += self._put_next(rows, row, position, samples)
            yield rows.finish(bad)

    def _put_next(self, rows: Rows, row: int, position: int, samples: Iterator[Any]) -> list[BadSample]:
        """Fills a row from the stream and returns the damaged samples that were passed over."""
        failures: list[str] = []
        for _ in range(NUM_ATTEMPTS):
            sample = next(samples)
            name = f"{_named(sample['__url__'])}:{sample['__key__']}"
            members = {key: value for key, value in sample.items() if isinstance(value, bytes)}
            try:
                rows.put(row, Sample(sample["__key__"], members), name)
            except SampleError as error:
                failures.append(str(error))
                continue
            return [BadSample(position, failure, name) for failure in failures]
        raise DataError(f"{NUM_ATTEMPTS} samples of the stream in a row cannot be used, first {failures[0]}")

    def _samples(self) -> Iterator[dict[str, Any]]:
        return iter(
            webdataset.DataPipeline(
                webdataset.ResampledShards(self._urls),
                self._read_shards,
                webdataset.shuffle(SHUFFLE_SAMPLES),
            )
        )

    def _read_shards(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Samples of one shard after another; one that breaks off is warned of and left.

        Raises:
            DataError: nothing can be read from shard after shard.
        """
        suffixes, num_failed = set(self._views.extensions), 0
        for shard in shards:
            try:
                with _opened(shard["url"]) as stream:
                    files = tariterators.tar_file_expander([{"url": shard["url"], "stream": stream}])
                    for sample in tariterators.group_by_keys(files, suffixes=suffixes):
                        num_failed = 0
                        yield sample
            # The libraries raise what they like about a broken tar, and so does a command that fails.
            except Exception as error:
                num_failed += 1
                line = f"{_named(shard['url'])} breaks off: {' '.join(str(error).split())}"
                if num_failed == MAX_FAILED_SHARDS:
                    raise DataError(f"{line}; {num_failed} shards in a row gave no sample") from error
                logger.warning("%s", line)


def _opened(url: str) -> Any:
    if url.startswith(PIPE) or not is_remote(url):
        # Not through webdataset's gopen, which would run shell commands for URLs of its own accord.
        return gopen_pipe(url) if url.startswith(PIPE) else open(url, "rb")
    from kandinsky_dist.data.remote.fetch import open_stream

    return open_stream(url)


def _named(url: str) -> str:
    """A shard for messages: a command without its arguments, which may hold secrets."""
    return f"{PIPE}{shlex.split(url.removeprefix(PIPE))[0]} ..." if url.startswith(PIPE) else url
