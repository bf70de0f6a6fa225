"""Indexing of existing tars: sidecars and a manifest, in parallel, restartable, wherever the tars lie."""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

from kandinsky_dist.data.captions import CaptionSource
from kandinsky_dist.data.indexing.index_shard import Indexed, Job, index_shard
from kandinsky_dist.data.locations import base_name, is_remote, relative
from kandinsky_dist.data.manifest import Manifest, write_manifest
from kandinsky_dist.data.patterns import Named, named_shards, shown, without_absent
from kandinsky_dist.data.shard_index import SIDECAR_SUFFIX
from kandinsky_dist.errors import DataError

SHARDS_PER_PROCESS = 4
"""A process costs a third of a second to start: fewer local shards than this are not worth one."""
MAX_CHUNK = 16
"""Shards that are handed to a process at a time; a chunk of one costs a millisecond of hand-over each."""
MAX_NAMED = 8
"""Damaged shards that a warning names."""

logger = logging.getLogger(__name__)


def index_shards(
    shards: str,
    *,
    out: Path | None = None,
    captions: tuple[str, ...] = ("txt",),
    checksums: bool = False,
    skip_damaged: bool = False,
    num_processes: int = min(16, os.cpu_count() or 1),
    progress: bool = True,
) -> Manifest:
    """Writes a sidecar for each tar and, last, the manifest of a folder.

    A local folder gets its manifest and, beside each tar, the sidecars; `out` takes both instead. Without
    `out`, a glob, brace pattern or list gets sidecars only. A shard whose sidecar notes its present length
    and modification time (or ETag) is not read again, so an interrupted run continues where it was. Samples
    without an image or a caption are left out and counted, unless they have encoder outputs (.cached).

    Args:
        shards: see `patterns.resolve_shards`.
        out: folder for manifest and sidecars; needed for remote shards.
        captions: extensions of which a sample needs one; sources as in data.captions will do, too.
        checksums: read every byte and note CRC-32s, so that changed bytes are noticed when they are used;
            always so for remote shards.
        skip_damaged: leave damaged shards out instead of refusing them.
        num_processes: shards that are read at a time.
        progress: show a bar on stderr when that is a terminal.

    Raises:
        DataError: damaged shards (all others are finished first), remote ones without `out` or that cannot
            be had, no usable sample at all.
        DiskFullError: no space left.
    """
    named = named_shards(shards)
    captions = tuple(dict.fromkeys(CaptionSource.parse(text).extension for text in captions))
    jobs = _jobs(shards, named, out, captions, checksums)
    indexed = []
    with tqdm(total=len(jobs), desc="index", unit="shard", disable=None if progress else True) as bar:
        for item in _indexed(jobs, num_processes):
            indexed.append(item)
            bar.update()
    absent = {item.job.tar for item in indexed if item.is_absent}
    without_absent(named, absent, f"shards={shown(shards)}")
    indexed = [item for item in indexed if not item.is_absent]
    usable = _without_damaged(shards, indexed, skip_damaged)
    _report_left_out(shards, usable, captions)
    folder = out if out is not None else Path(shards) if Path(shards).is_dir() else None
    manifest = Manifest.of(
        "" if folder is None else folder, [item.shard for item in usable if item.shard is not None]
    )
    if folder is not None:
        write_manifest(folder, manifest)
    return manifest


def _jobs(
    shards: str, named: Sequence[Named], out: Path | None, captions: tuple[str, ...], checksums: bool
) -> list[Job]:
    tars = [item.location for item in named]
    if out is None:
        remote = next((tar for tar in tars if is_remote(tar)), None)
        if remote is not None:
            raise DataError(
                f"shards={shown(shards)} lie on a server: give a folder for the index with --out FOLDER"
            )
        root = Path(shards) if Path(shards).is_dir() else None
        rows = [tar if root is None else relative(tar, root) for tar in tars]
        return [
            Job(tar, tar + SIDECAR_SUFFIX, row, row + SIDECAR_SUFFIX, captions, checksums)
            for tar, row in zip(tars, rows, strict=True)
        ]
    return [
        Job(
            item.location,
            str(out / sidecar),
            relative(item.location, out),
            sidecar,
            captions,
            checksums,
            item.is_optional,
        )
        for item, sidecar in zip(
            named, [name + SIDECAR_SUFFIX for name in names_below(shards, tars)], strict=True
        )
    ]


def names_below(shards: str, tars: Sequence[str]) -> list[str]:
    """Names for tars below a folder of their own: laid out as the tars are below what they share.

    Args:
        shards: what named them, for messages.
        tars: where they lie.

    Raises:
        DataError: two would have one name.
    """
    parts = [_parts(tar) for tar in tars]
    first, last = min(parts)[:-1], max(parts)[:-1]
    num_shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    names = ["/".join(part[num_shared:]) for part in parts]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"shards={shown(shards)} would need {name} for {count} shards; give shards of distinct names"
        )
    return names


def _parts(tar: str) -> list[str]:
    if not is_remote(tar):
        return list(Path(tar).absolute().parts[1:])
    # A server's names must not lead out of the folder.
    path = tar.partition("?")[0].partition("://")[2].split("/")
    return [part if part not in ("", ".", "..") else "_" for part in path]


def _indexed(jobs: Sequence[Job], num_processes: int) -> Iterator[Indexed]:
    """Indexes shards, several at a time; in their order."""
    per_process = 1 if any(is_remote(job.tar) for job in jobs) else SHARDS_PER_PROCESS
    num_processes = max(1, min(num_processes, len(jobs) // per_process))
    if num_processes == 1:
        yield from map(index_shard, jobs)
        return
    # spawn: the caller may have threads (tokenizers, torch), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    chunk = max(1, min(MAX_CHUNK, len(jobs) // (8 * num_processes)))
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        try:
            yield from pool.map(index_shard, jobs, chunksize=chunk)
        except BrokenProcessPool:
            raise DataError(
                "a process that indexed shards was killed (out of memory?); run it again, it continues, "
                f"with --num-processes below {num_processes}"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _without_damaged(shards: str, indexed: Sequence[Indexed], skip_damaged: bool) -> list[Indexed]:
    damaged = [item for item in indexed if item.damage]
    usable = [item for item in indexed if not item.damage]
    if damaged and (not skip_damaged or not usable):
        hint = "; --skip-damaged leaves damaged shards out" if usable else ""
        raise DataError(f"{len(damaged)} of {len(indexed)} shards are damaged: {damaged[0].damage}{hint}")
    if damaged:
        names = ", ".join(base_name(item.job.tar) for item in damaged[:MAX_NAMED])
        more = f" and {len(damaged) - MAX_NAMED} more" if len(damaged) > MAX_NAMED else ""
        logger.warning(
            "shards=%s: %d of %d shards are damaged and left out: %s%s (%s)",
            shown(shards),
            len(damaged),
            len(indexed),
            names,
            more,
            damaged[0].damage,
        )
    return usable


def left_out_summary(indexed: Sequence[Indexed]) -> str:
    """Counts of samples that could not be used, or ""."""
    counts = {
        "no image": sum(item.num_without_image for item in indexed),
        "no caption": sum(item.num_without_caption for item in indexed),
    }
    if not any(counts.values()):
        return ""
    first = next(item.first_left_out for item in indexed if item.first_left_out)
    words = ", ".join(f"{count} with {reason}" for reason, count in counts.items() if count)
    return f"{sum(counts.values())} samples left out ({words}), first {first}"


def _report_left_out(shards: str, indexed: Sequence[Indexed], captions: Sequence[str]) -> None:
    summary = left_out_summary(indexed)
    num_samples = [item.shard.num_samples for item in indexed if item.shard is not None]
    if sum(num_samples) == 0:
        needed = " or ".join(f".{extension}" for extension in captions)
        raise DataError(
            f"shards={shown(shards)}: no sample with an image and a {needed} in {len(indexed)} shards; "
            + (summary or "they are empty")
        )
    empty = [base_name(item.job.tar) for item in indexed if item.shard and item.shard.num_samples == 0]
    if empty:
        logger.warning("%d shards have no usable sample, first %s", len(empty), empty[0])
    if summary:
        logger.warning("%s", summary)
