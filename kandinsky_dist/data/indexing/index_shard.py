"""Indexing of one shard: its sidecar, unless that of an earlier run still holds."""

import errno
from dataclasses import dataclass
from pathlib import Path

from kandinsky_dist.data.indexing.samples import group_samples, is_image
from kandinsky_dist.data.indexing.tar_readers import DamagedShardError, Reader, open_reader
from kandinsky_dist.data.indexing.tarwalk import walk_tar
from kandinsky_dist.data.locations import base_name
from kandinsky_dist.data.manifest import Shard, row_of
from kandinsky_dist.data.remote.transports import MissingObjectError
from kandinsky_dist.data.shard_index import read_shard_index, write_shard_index
from kandinsky_dist.errors import DISK_FULL, DataError, DiskFullError


@dataclass(frozen=True)
class Job:
    """A shard to index.

    Attributes:
        tar: where it lies.
        sidecar: file to write.
        row_tar, row_sidecar: how the manifest is to call the two.
        captions: extensions of which a sample needs one.
        checksums: read every byte.
        is_optional: whether a remote shard need not be there.
    """

    tar: str
    sidecar: str
    row_tar: str
    row_sidecar: str
    captions: tuple[str, ...]
    checksums: bool
    is_optional: bool = False


@dataclass(frozen=True)
class Indexed:
    """What indexing one shard found: a row of the manifest, or why there is none.

    Attributes:
        damage: what is wrong with it, one line.
        is_absent: it need not be there, and is not.
    """

    job: Job
    shard: Shard | None = None
    num_without_image: int = 0
    num_without_caption: int = 0
    first_left_out: str = ""
    damage: str = ""
    is_absent: bool = False


def index_shard(job: Job) -> Indexed:
    """Indexes one shard, or takes what its sidecar says when the tar has not changed since.

    Raises:
        DataError: a remote shard that cannot be had, or a sidecar that cannot be written.
    """
    try:
        with open_reader(job.tar) as reader:
            return _kept(job, reader) or _walked(job, reader)
    except DamagedShardError as error:
        return Indexed(job, damage=str(error))
    except MissingObjectError:
        if not job.is_optional:
            raise
        return Indexed(job, is_absent=True)


def _kept(job: Job, reader: Reader) -> Indexed | None:
    try:
        index = read_shard_index(job.sidecar, "")
        metadata = index.metadata
        same = all(metadata[name] == value for name, value in reader.version.items())
        if not same or metadata["captions"] != " ".join(job.captions):
            return None
        if job.checksums and metadata["checksums"] != "1":
            return None
        return Indexed(
            job,
            row_of(index, job.row_tar, job.row_sidecar),
            int(metadata["num_without_image"]),
            int(metadata["num_without_caption"]),
            metadata["first_left_out"],
        )
    except (DataError, KeyError, ValueError):
        return None


def _walked(job: Job, reader: Reader) -> Indexed:
    table = walk_tar(reader, checksums=job.checksums, is_image=is_image)
    samples, left_out = group_samples(reader.location, table.members, job.captions)
    counts = {reason: sum(found == reason for found, _ in left_out) for reason in ("image", "caption")}
    first = f"{base_name(job.tar)}:{left_out[0][1]}" if left_out else ""
    metadata = {
        **reader.version,
        "fingerprint": table.fingerprint,
        "captions": " ".join(job.captions),
        "checksums": "1" if job.checksums or reader.is_sequential else "0",
        "num_without_image": str(counts["image"]),
        "num_without_caption": str(counts["caption"]),
        "first_left_out": first.encode("utf-8", "replace").decode(),
    }
    path = Path(job.sidecar)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard_index(path, samples, metadata)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"no space left for {path} ({error.strerror}); free some and give the same command again"
            ) from error
        hint = ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "; put the index elsewhere with --out FOLDER"
        raise DataError(f"{path} cannot be written: {error.strerror or error}{hint}") from error
    # Read back: the row of this run and that of one that finds the sidecar are made alike.
    index = read_shard_index(job.sidecar, "")
    return Indexed(
        job,
        row_of(index, job.row_tar, job.row_sidecar),
        counts["image"],
        counts["caption"],
        metadata["first_left_out"],
    )
