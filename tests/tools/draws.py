"""The edits that a seed draws."""

import ast
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tools.changed import PACKAGE
from tools.operators import Edit, edits_of

PLOTS = ("_picture", "_plot")
"""Modules that draw figures: most faults in them are a matter of taste."""


def compiles(edit: Edit, source: bytes) -> bool:
    """Return whether the edited source can be parsed."""
    try:
        ast.parse(edit.applied(source))
    except SyntaxError:
        return False
    return True


def _drawn(edits: Iterable[Edit], sources: dict[str, bytes], generator: random.Random) -> Iterator[Edit]:
    """Yield the edits of one room in a random order, the kinds equally often, one a line."""
    kinds: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        kinds[edit.operator].append(edit)
    lines = set()
    while kinds:
        kind = generator.choice(sorted(kinds))
        edit = kinds[kind].pop(generator.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        if (edit.path, edit.line) not in lines and compiles(edit, sources[edit.path]):
            lines.add((edit.path, edit.line))
            yield edit


def draw(root: Path, rooms: Sequence[str], seed: int, count: int) -> list[Edit]:
    """Return `count` edits, the rooms in turn; a larger count begins with the edits of a smaller one."""
    sources: dict[str, bytes] = {}
    streams = {}
    for room in rooms:
        files = sorted((root / PACKAGE / room).rglob("*.py"))
        files = [file for file in files if not file.stem.endswith(PLOTS)]
        found = []
        for file in files:
            path = file.relative_to(root / PACKAGE).as_posix()
            sources[path] = file.read_bytes()
            found += edits_of(path, sources[path])
        streams[room] = _drawn(found, sources, random.Random(f"{seed}/{room}"))
    drawn: list[Edit] = []
    while streams and len(drawn) < count:
        for room, stream in list(streams.items()):
            edit = next(stream, None)
            if edit is None:
                del streams[room]
            else:
                drawn.append(edit)
    return drawn[:count]
