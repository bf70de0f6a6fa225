"""What a user writes for data.shards -> the tars that it names."""

import glob
import itertools
import re
from collections import Counter
from pathlib import Path

from kandinsky_dist.errors import DataError


def resolve_shards(shards: str, key: str = "shards") -> list[Path]:
    """The tars that a folder, glob, brace pattern or list file names, sorted or in the pattern's order.

    Raises:
        DataError: none, or a list file that cannot be read.
    """
    if re.match(r"[a-z0-9]+://|pipe:", shards):
        raise DataError(f"{key}={shards}: remote shards cannot be read yet; copy them to a folder")
    path = Path(shards)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.suffix == ".txt":
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except OSError as error:
            raise DataError(f"{key}={shards}: {error.strerror or error}") from error
        names = [line for line in lines if line and not line.startswith("#")]
        found = [path.parent / name for line in names for name in _expand(line)]
    elif "{" in shards or glob.has_magic(shards) or path.suffix == ".tar":
        found = [Path(name) for name in _expand(shards)]
    else:
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{key}={shards} {what}; give a folder of .tar shards, a glob or a list file")
    if not found:
        raise DataError(f"{key}={shards} names no .tar shards; to make some: kandinsky-dist data pack")
    if len(set(found)) < len(found):
        twice = Counter(found).most_common(1)[0][0]
        raise DataError(f"{key}={shards} names {twice} twice; list each shard once")
    return found


def _expand(pattern: str) -> list[str]:
    """Braces first, in their order; then what each glob finds, sorted. A plain name need not exist."""
    names = []
    for name in _expand_braces(pattern):
        names += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    return names


def _expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with {first..last} and {a,b} parts; leading zeros give the width."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices: list[list[str]] = []
    for part in parts:
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            first, last = int(span[1]), int(span[2])
            width = len(span[1]) if span[1].startswith("0") else 0
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        elif part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return ["".join(words) for words in itertools.product(*choices)]
