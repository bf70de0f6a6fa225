"""Folders of shards or manifests that are there whole or not at all, and know the call that made them."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.errors import DISK_FULL, ConfigError, DataError, DiskFullError

ORIGIN_NAME = "origin.json"
"""Beside the manifest: the call that it is the result of."""

logger = logging.getLogger(__name__)


def existing_result(out: Path, origin: Mapping[str, Any]) -> Manifest | None:
    """The complete result of an earlier, equal call; None when `out` is free.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        same = (out / ORIGIN_NAME).read_text() == _origin_text(origin)
    except OSError:
        same = False
    if not same:
        raise ConfigError(
            f"{out} exists and was not made by this very command; remove it or choose another folder"
        )
    manifest = read_manifest(str(out))
    logger.warning("%s is already complete (%d samples): kept", out, manifest.num_samples)
    return manifest


@contextmanager
def result_folder(out: Path, origin: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder beside `out`, which gets its name and notes its origin when the block has ended well.

    Raises:
        DataError: it cannot be written.
        DiskFullError: no space left.
    """
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield temporary
        (temporary / ORIGIN_NAME).write_text(_origin_text(origin))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.rename(temporary, out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"no space left for {out} in {out.parent} ({error.strerror}); free some and retry"
            ) from error
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _origin_text(origin: Mapping[str, Any]) -> str:
    return json.dumps(origin, indent=1, sort_keys=True) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
