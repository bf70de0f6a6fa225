"""Writing of shards through the webdataset library: complete and indexed, or not there at all."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.index import index_shards
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.errors import DISK_FULL, ConfigError, DataError, DiskFullError

ORIGIN_NAME = "origin.json"
"""Beside the shards: the call that they are the result of."""


class NoSamplesError(DataError):
    """There was nothing to write."""


logger = logging.getLogger(__name__)


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
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        _write_tars(samples, temporary, samples_per_shard, prefix)
        index_shards(str(temporary), checksums=True, progress=False)
        (temporary / ORIGIN_NAME).write_text(origin_text(origin))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.rename(temporary, out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"no space left for shards in {out.parent} ({error.strerror}); free some and retry"
            ) from error
        raise DataError(f"cannot write shards to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_manifest(str(out))


def existing_result(out: Path, origin: Mapping[str, Any]) -> Manifest | None:
    """The complete result of an earlier, equal call; None when `out` is free.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        same = (out / ORIGIN_NAME).read_text() == origin_text(origin)
    except OSError:
        same = False
    if not same:
        raise ConfigError(
            f"{out} exists and was not made by this very command; remove it or choose another folder"
        )
    manifest = read_manifest(str(out))
    logger.warning("%s is already complete (%d samples): kept", out, manifest.num_samples)
    return manifest


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


def origin_text(origin: Mapping[str, Any]) -> str:
    """What is kept beside a result to know it again."""
    return json.dumps(origin, indent=1, sort_keys=True) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
