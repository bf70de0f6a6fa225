"""Writing of shards through the webdataset library: complete and indexed, or not there at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.origin import existing_result, result_folder
from kandinsky_dist.errors import ConfigError, DataError


class NoSamplesError(DataError):
    """There was nothing to write."""


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    samples_per_shard: int,
    origin: Mapping[str, Any],
    prefix: str = "train",
) -> Manifest:
    """Writes samples to `out`/PREFIX-00000.tar ..., with manifest; equal samples give equal bytes.

    Everything is made in a folder beside `out` that gets its name when it is complete. A complete result of
    the same `origin` is kept and `samples` is not touched.

    Args:
        samples: mappings with "__key__" and, by extension, bytes.
        out: folder that does not exist yet or is empty.
        samples_per_shard: the last shard may be shorter.
        origin: what determines the samples, JSON values only.
        prefix: first part of the shards' names.

    Raises:
        ConfigError: `out` holds something else.
        DataError: no samples.
        DiskFullError: no space left.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard} must be at least 1")
    present = existing_result(out, origin)
    if present is not None:
        return present
    with result_folder(out, origin) as folder:
        _write_tars(samples, folder, samples_per_shard, prefix)
        index_shards(str(folder), checksums=True, progress=False)
    return read_manifest(str(out))


def _write_tars(
    samples: Iterable[Mapping[str, Any]], folder: Path, samples_per_shard: int, prefix: str
) -> None:
    pattern = f"{str(folder.absolute()).replace('%', '%%')}/{prefix}-%05d.tar"
    num_samples = 0
    writer = webdataset.ShardWriter(
        pattern,
        maxcount=samples_per_shard,
        maxsize=float("inf"),
        verbose=0,
        encoder=False,
        user="",
        group="",
        mtime=0,
        format="PAX_FORMAT",  # ustar would refuse long keys
    )
    with writer:
        for sample in samples:
            writer.write(sample)
            num_samples += 1
    if num_samples == 0:
        raise NoSamplesError("no usable samples: nothing was written")
