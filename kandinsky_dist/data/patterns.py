"""What a user writes for data.shards -> where the tars lie that it names."""

import fnmatch
import glob
import itertools
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kandinsky_dist.data.locations import base_name, is_remote, join
from kandinsky_dist.errors import DataError

MAX_EXPANDED = 10_000_000
"""Names of one brace pattern; more are a slip of the finger."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """Where a tar lies that was named; whether it need not be there, since a numbering may have gaps."""

    location: str
    is_optional: bool = False


def resolve_shards(shards: str, key: str = "shards") -> list[str]:
    """Locations of the tars that a setting names, sorted or in the pattern's order.

    Args:
        shards: a folder (with all below it but hidden ones), glob, brace pattern like `{000..012}.tar`, list
            file (.txt, one a line, relative to it), URL or URL pattern, or `s3://bucket/prefix/`. Local tars
            that a brace pattern names need not all exist; one warning counts the missing ones.
        key: the setting that named them, for messages.

    Raises:
        DataError: none, one named twice, or a list file or URL that cannot be read.
    """
    return [named.location for named in named_shards(shards, key)]


def named_shards(shards: str, key: str = "shards") -> list[Named]:
    """As `resolve_shards`; says of each remote tar whether it need not be there."""
    problem = f"{key}={shown(shards)}"
    if shards.startswith("pipe:"):
        raise DataError(
            f"{problem}: a pipe runs a shell command and has no manifest; data.allow_pipe=true lets training "
            "stream it, without exact resume"
        )
    if re.match(r"[a-zA-Z0-9+.-]+://", shards) and not is_remote(shards):
        raise DataError(f"{problem}: only http://, https:// and s3:// URLs can be read")
    path = Path(shards)
    if is_remote(shards):
        found = _remote(shards, problem)
    elif path.is_dir():
        found = [Named(os.path.join(path, name)) for name in tars_below(path)]
    elif path.suffix == ".txt":
        found = _listed(path, problem)
    elif "{" in shards or glob.has_magic(shards) or path.suffix == ".tar":
        found = _local(shards)
    else:
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{problem} {what}; give a folder of .tar shards, a glob or a list file")
    found = _present(found, problem)
    if not found:
        raise DataError(f"{problem} names no .tar shards; to make some: kandinsky-dist data pack")
    (twice, count), *_ = Counter(named.location for named in found).most_common(1)
    if count > 1:
        raise DataError(f"{problem} names {shown(twice)} twice; list each shard once")
    return found


def shown(location: str) -> str:
    """A location for messages: what follows the question mark of a URL may be secret."""
    if not is_remote(location):
        return location
    from kandinsky_dist.data.remote.transports import redacted

    return redacted(location)


def tars_below(folder: Path) -> list[str]:
    """Paths of all tars in a folder and those below it, relative to it and sorted; hidden ones left out."""
    found: list[tuple[str, ...]] = []
    seen = set()  # links may lead back up
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tars = [name for name in files if name.endswith(".tar") and not name.startswith(".")]
        if tars:
            parts = Path(root).relative_to(folder).parts
            found += [(*parts, name) for name in tars]
    return ["/".join(parts) for parts in sorted(found)]


def _listed(path: Path, problem: str) -> list[Named]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8", "surrogateescape").splitlines()]
    except OSError as error:
        raise DataError(f"{problem}: {error.strerror or error}") from error
    found: list[Named] = []
    for line in lines:
        if line.startswith("pipe:"):
            raise DataError(f"{problem} lists {line}: a list holds files and URLs only")
        if line and not line.startswith("#"):
            found += _remote(line, problem) if is_remote(line) else _local(join(str(path.parent), line))
    return found


def _local(pattern: str) -> list[Named]:
    """Braces first, in their order; then what each glob finds, sorted."""
    found: list[Named] = []
    names = expand_braces(pattern)
    for name in names:
        if glob.has_magic(name):
            tars = [tar for tar in glob.glob(name, recursive=True) if tar.endswith(".tar")]
            found += [Named(str(Path(tar))) for tar in sorted(tars)]
        else:
            found.append(Named(str(Path(name)), is_optional=len(names) > 1))
    return found


def _remote(url: str, problem: str) -> list[Named]:
    names = expand_braces(url)
    found: list[Named] = []
    for name in names:
        if base_name(name).endswith(".tar") and not (name.startswith("s3://") and glob.has_magic(name)):
            found.append(Named(name, is_optional=len(names) > 1))
        elif name.startswith("s3://"):
            found += _bucket(name)
        else:
            raise DataError(
                f"{problem}: a web server does not say which shards it has; give their names, "
                f"like {shown(url).rstrip('/')}/{{00000..00999}}.tar"
            )
    return found


def _bucket(name: str) -> list[Named]:
    from kandinsky_dist.data.remote.fetch import list_tars

    if not glob.has_magic(name):
        return [Named(tar) for tar in sorted(list_tars(name.rstrip("/") + "/"))]
    folder = name[: re.search(r"[*?\[]", name).start()].rpartition("/")[0]  # type: ignore[union-attr]
    return [Named(tar) for tar in sorted(list_tars(folder + "/")) if fnmatch.fnmatchcase(tar, name)]


def _present(found: list[Named], problem: str) -> list[Named]:
    """Without local tars of a sparse numbering that are not there."""
    absent = {
        named.location
        for named in found
        if named.is_optional and not is_remote(named.location) and not os.path.exists(named.location)
    }
    return without_absent(found, absent, problem)


def without_absent(found: list[Named], absent: set[str], problem: str) -> list[Named]:
    """What is left of a numbering with gaps; warns of them.

    Args:
        found: all that were named.
        absent: locations of those that are not there.
        problem: the setting, for messages.

    Raises:
        DataError: nothing is left.
    """
    if not absent:
        return found
    first = shown(next(named.location for named in found if named.location in absent))
    if len(absent) == len(found):
        raise DataError(f"{problem}: none of the {len(found)} shards exists, first {first}")
    logger.warning("%s: %d of %d numbers have no shard, first %s", problem, len(absent), len(found), first)
    return [named for named in found if named.location not in absent]


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with {first..last} and {a,b} parts; leading zeros give the width.

    Raises:
        DataError: more than ten million.
    """
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices: list[list[str]] = []
    num_names = 1
    for part in parts:
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            first, last = int(span[1]), int(span[2])
            num_names *= abs(last - first) + 1
            if num_names > MAX_EXPANDED:
                raise DataError(f"{pattern} names more than {MAX_EXPANDED:,} shards; narrow the numbers")
            width = len(span[1]) if span[1].startswith("0") else 0
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        elif part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
            num_names *= len(choices[-1])
        else:
            choices.append([part])
    return ["".join(words) for words in itertools.product(*choices)]
