"""CPU memory that is left: the machine's, or what the control groups above this process leave. No torch."""

import sys
from collections.abc import Iterator
from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")
"""Files of a control group with its limit and what it holds, and the prefix of memory.stat's sums over the
groups below. Source: Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst."""


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that processes beside this one and itself can still take; caches of files count as free.

    The least of what the kernel calls available and what is left of each limit: Slurm (--mem) and containers
    set one, and a process that goes beyond it is killed without a word.

    Args:
        root: of the file system.
    """
    found = [left for folder, names in _groups(root) if (left := _left(folder, names)) is not None]
    return min([_available(root), *found])


def _available(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: nothing is known
        return sys.maxsize
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of this process's control groups up to the topmost, and how their files are called.

    A container may see the paths of its host, whose folders are not there: the topmost one is its own.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        inside = Path(path.lstrip("/"))
        for place in (inside, *inside.parents):
            yield top / place, _V1 if controllers else _V2


def _left(folder: Path, names: tuple[str, str, str]) -> int | None:
    limit_name, usage_name, prefix = names
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    cached = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return max(0, int(limit) - usage + cached)
