"""Folders that exist whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kandinsky_dist.errors import DISK_FULL, ConfigError, DiskFullError
from kandinsky_dist.runtime.disk import sync


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which takes its name when the block has ended well.

    A failed or interrupted block leaves `out` as it was and removes what it had written.

    Args:
        out: does not exist yet, or is empty.

    Raises:
        ConfigError: `out` holds something, or cannot be made there.
        DiskFullError: no space left.
    """
    from safetensors import SafetensorError

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: name a new folder or remove it")
    partial = out.absolute().parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                sync(path)  # the bytes reach the disk before the folder gets its name
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own, with the number in its text.
        number = getattr(error, "errno", None)
        if number in DISK_FULL or any(f"os error {code}" in str(error) for code in DISK_FULL):
            raise DiskFullError(
                f"{out} cannot be written: its disk is full or a quota is used up; nothing was kept"
            ) from error
        if str(getattr(error, "filename", None)).startswith(str(partial)):
            raise ConfigError(
                f"{out} cannot be written: {os.strerror(number or 0)}; name another folder"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
