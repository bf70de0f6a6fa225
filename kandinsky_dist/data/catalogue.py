"""From data.shards to the manifest of what it names, and a look at whether the shards are there."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from kandinsky_dist.data.locations import base_name, is_remote, join
from kandinsky_dist.data.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, row_of
from kandinsky_dist.data.patterns import resolve_shards, shown, tars_below
from kandinsky_dist.data.shard_index import SIDECAR_SUFFIX, read_shard_index
from kandinsky_dist.errors import DataError

NUM_THREADS = 16
"""Questions to a file system at a time: on a network one each takes up to a millisecond. On a local disk
threads only cost: 100,000 questions take 0.5 s with 16 and 0.25 s with one (2 cores)."""
REMOTE = -1

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def read_manifest(shards: str, key: str = "data.shards") -> Manifest:
    """The manifest of a corpus, without a look at its tars.

    Args:
        shards: folder or folder URL with a manifest; or local glob, brace pattern or list file (.txt) of tars
            that have sidecars beside them.
        key: the setting that named it, for messages.

    Raises:
        DataError: nothing there, not indexed, no samples.
    """
    if is_remote(shards):
        manifest = _remote_folder(shards, key)
    elif Path(shards).is_dir():
        if not (Path(shards) / MANIFEST_NAME).exists():
            resolve_shards(shards, key)  # no tars either: that is the better message
        manifest = load_manifest(shards, _remedy(shards))
    else:
        manifest = _from_sidecars(shards, key)
    if manifest.num_samples == 0:
        raise DataError(f"{key}={shards} has {len(manifest)} shards but no samples")
    return manifest


def check_presence(
    manifest: Manifest, shards: str, key: str = "data.shards", share: slice = slice(None)
) -> None:
    """Makes sure, without opening them, that all local shards are there. For one rank: a look at every file.

    Warns of tars in the folder that the manifest does not have.

    Args:
        share: of the manifest's shards, where several look at a part each.

    Raises:
        DataError: a shard or sidecar is missing, or a shard is of another size than its manifest says.
    """
    chosen = range(len(manifest))[share]
    tars = [join(manifest.root, manifest.tars[index]) for index in chosen]
    sidecars = [join(manifest.root, manifest.sidecars[index]) for index in chosen]
    found = _in_threads(_sizes, list(zip(tars, sidecars, strict=True)))
    for tar, expected, (num_bytes, _) in zip(tars, manifest.num_bytes_S[share].tolist(), found, strict=True):
        if num_bytes not in (None, REMOTE, expected):
            raise DataError(
                f"{tar} has {num_bytes} bytes, its manifest says {expected}: "
                f"changed or cut short; copy it again, or run: {_remedy(shards)}"
            )
    missing = [tar for tar, (num_bytes, _) in zip(tars, found, strict=True) if num_bytes is None]
    if missing:
        raise DataError(_missing(f"{key}={shards}", missing, len(manifest)))
    lost = [sidecar for sidecar, (_, num_bytes) in zip(sidecars, found, strict=True) if num_bytes is None]
    if lost:
        raise DataError(
            f"{key}={shards}: {len(lost)} of {len(manifest)} shards have lost their index, first {lost[0]}; "
            f"run: {_remedy(shards)}"
        )
    if not is_remote(shards) and Path(shards).is_dir():
        _warn_of_unlisted(manifest, shards)


def _warn_of_unlisted(manifest: Manifest, folder: str) -> None:
    unlisted = sorted(set(tars_below(Path(folder))) - set(manifest.tars))
    if unlisted:
        # Not an error: a corpus may grow while a run that was started on less of it is being resumed.
        logger.warning(
            "%d shards in %s are not in its manifest nor used, first %s; run: %s",
            len(unlisted),
            folder,
            unlisted[0],
            _remedy(folder),
        )


def _remedy(shards: str) -> str:
    return f"kandinsky-dist data index {shards}"


def _remote_folder(shards: str, key: str) -> Manifest:
    name = base_name(shards)
    is_folder = shards.endswith("/") or not (name.endswith(".tar") or any(sign in shards for sign in "{*["))
    if not is_folder:
        raise DataError(
            f"{key}={shown(shards)}: shards on a server need an index; "
            f"run: kandinsky-dist data index '{shown(shards)}' "
            f"--out FOLDER, and give FOLDER as {key}"
        )
    from kandinsky_dist.data.remote.fetch import fetch_whole
    from kandinsky_dist.data.remote.transports import MissingObjectError

    root, remedy = shards.rstrip("/"), "kandinsky-dist data index 'PATTERN' --out FOLDER"
    try:
        data = fetch_whole(join(root, MANIFEST_NAME))
    except MissingObjectError as error:
        raise DataError(f"{key}={shown(shards)} has no {MANIFEST_NAME}; run: {remedy}") from error
    return load_manifest(root, remedy, data)


def _from_sidecars(shards: str, key: str) -> Manifest:
    tars = resolve_shards(shards, key)
    if any(is_remote(tar) for tar in tars):
        raise DataError(
            f"{key}={shards} names shards on a server, which need an index; "
            f"run: kandinsky-dist data index '{shards}' --out FOLDER, and give FOLDER as {key}"
        )
    missing = [tar for tar, size in zip(tars, _in_threads(_size, tars), strict=True) if size is None]
    if missing:
        raise DataError(_missing(f"{key}={shards}", missing, len(tars)))
    sidecars = [tar + SIDECAR_SUFFIX for tar in tars]
    strangers = [tar for tar, size in zip(tars, _in_threads(_size, sidecars), strict=True) if size is None]
    if strangers:
        raise DataError(
            f"{key}={shards}: {len(strangers)} of {len(tars)} shards are not indexed, first {strangers[0]}; "
            f"run: kandinsky-dist data index '{shards}'"
        )

    def row(tar: str) -> Shard:
        sidecar = tar + SIDECAR_SUFFIX
        index = read_shard_index(sidecar, f"kandinsky-dist data index '{shards}'")
        try:
            return row_of(index, tar, sidecar)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{sidecar} cannot be read ({error}); run: kandinsky-dist data index '{shards}'"
            ) from error

    return Manifest.of("", _in_threads(row, tars))


def _missing(problem: str, missing: Sequence[str], num_shards: int) -> str:
    return (
        f"{problem}: {len(missing)} of {num_shards} shards are missing, first {missing[0]}; "
        "copy them again, or index what is there"
    )


def _sizes(locations: Sequence[str]) -> list[int | None]:
    return [_size(location) for location in locations]


def _size(location: str) -> int | None:
    """Length of a local file in bytes, None if there is none; a remote one is not looked for."""
    try:
        return REMOTE if is_remote(location) else os.stat(location).st_size
    except OSError:
        return None


def _in_threads(ask: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Answers in the items' order."""
    if len(items) <= NUM_THREADS:
        return [ask(item) for item in items]
    # Slices, not items: a task costs more than a question to a local disk.
    step = -(-len(items) // NUM_THREADS)
    slices = [items[start : start + step] for start in range(0, len(items), step)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [
            answer for part in pool.map(lambda part: [ask(item) for item in part], slices) for answer in part
        ]
