"""Print the test files that reach a change, nearest first.

A test reaches a module if it imports it, directly or through other modules; imports inside functions count.
It reaches a fixture's imports if it names the fixture. `python -m kandinsky_dist` and a module's name as a
string count as imports. Files that are not Python select the tests whose source names them.

    pytest -n 2 $(python tests/tools/changed.py --tier unit)
"""

import argparse
import ast
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when this file is started as a program

from helpers.imports import imported_by, modules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kandinsky_dist"
TIERS = ("unit", "process", "slurm", "gpu")
MARKS = {"dist": "process", "integration": "process", "slurm": "slurm", "gpu": "gpu"}
EVERYTHING = ("pyproject.toml", "launch/test.sh", "tests/conftest.py")
READERS = {
    f"{PACKAGE}/recipes/": f"{PACKAGE}/config/loader.py",
    "ds_configs/": f"{PACKAGE}/parallel/ds_config.py",
}
"""Folder of data files -> the module that reads them."""

BY_NAME = ("usefixtures", "getfixturevalue")
WHOLE_PACKAGE = f"{PACKAGE}::all"
_STARTED = re.compile(rf"(?:-m|--module)[\"',\s]+({PACKAGE}(?:\.\w+)*)")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


@dataclass(frozen=True)
class Selected:
    """A test file that a change selects.

    Attributes:
        distance: imports between the test and the nearest changed file; 0: the test names or is that file.
        tier: one of TIERS.
        path: relative to the repository.
    """

    distance: int
    tier: str
    path: str


class ImportGraph:
    """Imports of the package and the tests of a checkout, as a graph.

    A node is a file, relative to the checkout, or CONFTEST::FIXTURE for a fixture with imports of its own.

    Args:
        root: the checkout.
        deleted: Python files that the change deletes and others may still import.
    """

    def __init__(self, root: Path, deleted: Iterable[str] = ()) -> None:
        self.root = root
        self.tests: dict[str, str] = {}  # test file -> tier
        self.texts: dict[str, str] = {}  # file below tests/ -> its source
        self._imported: dict[str, set[str]] = {}
        self._fixtures: dict[str, set[str]] = {}  # conftest.py -> its fixtures' names
        self._deleted = [root / path for path in deleted if path.endswith(".py")]
        names = cache(self._names)
        self._modules = cache(modules)
        files = sorted((root / "tests").rglob("conftest.py"), key=lambda path: len(path.parts))
        files += [path for path in sorted((root / "tests").rglob("*.py")) if path not in files]
        for path in files:  # conftest.py first, parents first: tests are resolved against their fixtures
            self._add_test_source(path, names(path.parent))
        package = names(root)
        for name, path in package.items():
            if path.exists():
                nodes = list(ast.walk(ast.parse(path.read_text())))
                found = imported_by(name, nodes, package, is_package=path.name == "__init__.py")
                self._imported[self._node(path)] = self._files(found | _strings(nodes), package)
        self._imported[WHOLE_PACKAGE] = set(map(self._node, package.values()))

    def importers(self) -> dict[str, set[str]]:
        """Return node -> nodes that import it."""
        found: dict[str, set[str]] = {}
        for importer, imported in self._imported.items():
            for node in imported:
                found.setdefault(node, set()).add(importer)
        return found

    def __contains__(self, node: str) -> bool:
        return node in self._imported or self.root / node in self._deleted

    def _node(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _names(self, folder: Path) -> dict[str, Path]:
        """Return dotted name -> file of every module that a source in `folder` can import."""
        found = dict(self._modules(self.root / PACKAGE, self.root))
        bases = [self.root, *(base for base in reversed([folder, *folder.parents]) if self._is_test(base))]
        for base in bases:  # the innermost folder wins, as on pytest's search path
            if base != self.root:
                found |= self._modules(base, base)
            for path in self._deleted:
                if path.is_relative_to(base):
                    found[".".join(path.relative_to(base).with_suffix("").parts)] = path
        return found

    def _is_test(self, path: Path) -> bool:
        return path.is_relative_to(self.root / "tests")

    def _files(self, dotted: Iterable[str], names: dict[str, Path]) -> set[str]:
        """Return the files of modules, by dotted names, and of the packages around them."""
        found: set[str] = set()
        for name in dotted:
            parts = name.split(".")
            prefixes = (".".join(parts[: length + 1]) for length in range(len(parts)))
            found.update(self._node(names[prefix]) for prefix in prefixes if prefix in names)
        return found

    def _add_test_source(self, path: Path, names: dict[str, Path]) -> None:
        node, text = self._node(path), path.read_text()
        tree = ast.parse(text)
        self.texts[node] = text
        own = _fixtures(tree) if path.name == "conftest.py" else {}
        self._fixtures[node] = set(own)
        for name, function in own.items():
            nodes = list(ast.walk(function))
            found = self._files(imported_by(name, nodes, names) | _strings(nodes), names)
            self._imported[f"{node}::{name}"] = found | self._fixture_nodes(path, _parameters(nodes))
        nodes = list(ast.walk(ast.Module([part for part in tree.body if part not in own.values()], [])))
        imports = imported_by(path.stem, nodes, names) | _strings(nodes)
        started = {name if "." in name else f"{name}.__main__" for name in _STARTED.findall(text)}
        found = self._files(imports | started, names)
        if PACKAGE in imports:
            found.add(WHOLE_PACKAGE)  # it looks at the package's files
        found |= {self._node(conftest) for conftest in self._conftests(path)}
        if path.name == "conftest.py":
            automatic = {name for name, function in own.items() if "autouse" in ast.dump(function)}
            found |= {f"{node}::{name}" for name in automatic}
        else:
            found |= self._fixture_nodes(path, _parameters(nodes))
        self._imported[node] = found - {node}
        if path.name.startswith("test_"):
            self.tests[node] = _tier(tree)

    def _conftests(self, path: Path) -> list[Path]:
        parents = [path.parent, *path.parent.parents]
        found = [parent / "conftest.py" for parent in parents if self._is_test(parent)]
        return [conftest for conftest in found if conftest.exists()]

    def _fixture_nodes(self, path: Path, names: set[str]) -> set[str]:
        """Return the nodes of fixtures, by their names, in the conftest.py files that a file sees."""
        seen = [self._node(conftest) for conftest in self._conftests(path)]
        return {f"{node}::{name}" for node in seen for name in names & self._fixtures.get(node, set())}


def _strings(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the strings that look like a dotted name: arguments of monkeypatch and importlib."""
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and _DOTTED.fullmatch(value)}


def _fixtures(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        function.name: function
        for function in functions
        if any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list)
    }


def _parameters(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names of all parameters, and of fixtures that are named by a string."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in BY_NAME:
            found.update(str(part.value) for part in node.args if isinstance(part, ast.Constant))
    return found


def _tier(tree: ast.Module) -> str:
    """Return the tier of a test file by its `pytestmark`."""
    marks = {
        part.attr
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for part in ast.walk(node.value)
        if isinstance(part, ast.Attribute)
    }
    tiers = [MARKS[mark] for mark in marks if mark in MARKS]
    return max(tiers, key=TIERS.index, default="unit")


def _naming(path: str, texts: dict[str, str]) -> list[str]:
    """Return the files below tests/ whose source names a file or its folder."""
    parts = path.split("/")
    names = [parts[-1]]
    if len(parts) == 1 or parts[-2] == "recipes":
        names.append(parts[-1].partition(".")[0] or parts[-1])
    folder = parts[1 if parts[0] == PACKAGE else 0] if len(parts) > 1 and parts[0] != "tests" else None
    pattern = re.compile(rf"(?<![\w.]){folder}[\"'/]|mark\.{folder}\b") if folder else None
    return [
        file
        for file, text in texts.items()
        if any(name in text for name in names) or (pattern and pattern.search(text))
    ]


def select(graph: ImportGraph, changed: Iterable[str]) -> list[Selected]:
    """Return the test files that reach changed files, nearest first, in one distance by tier.

    Args:
        graph: imports of the checkout.
        changed: paths relative to it.
    """
    starts: set[str] = set()
    for path in changed:
        if path in graph:
            starts.add(path)
            if path not in EVERYTHING:
                continue
        if path in EVERYTHING:
            starts.update(graph.tests)
            continue
        starts.update(_naming(path, graph.texts))
        starts.update(
            reader
            for folder, reader in READERS.items()
            if path.startswith(folder) and path.endswith((".yaml", ".json"))
        )
    distances = dict.fromkeys(sorted(starts), 0)
    importers = graph.importers()
    waiting = deque(distances)
    while waiting:
        node = waiting.popleft()
        if node == WHOLE_PACKAGE:
            continue
        for importer in sorted(importers.get(node, ())):
            if importer not in distances:
                distances[importer] = distances[node] + 1
                waiting.append(importer)
    if WHOLE_PACKAGE in distances:  # tests that look at every file of the package: least likely to fail
        farthest = max(distances.values()) + 1
        for test in importers.get(WHOLE_PACKAGE, ()):
            distances.setdefault(test, farthest)
    found = [Selected(distances[test], tier, test) for test, tier in graph.tests.items() if test in distances]
    return sorted(found, key=lambda one: (one.distance, TIERS.index(one.tier), one.path))


def changed_since(root: Path, ref: str) -> list[str]:
    """Return the files that differ between a commit and the working tree, and the untracked files."""
    listings = (
        ["diff", "--name-only", "--no-renames", "--relative", "-z", ref, "--"],
        ["ls-files", "--others", "--exclude-standard", "-z"],
    )
    found: set[str] = set()
    for words in listings:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"git {words[0]} failed: {done.stderr.strip().splitlines()[0]}")
        found.update(filter(None, done.stdout.split("\0")))
    return sorted(found)


def main() -> None:
    """Print the selection of the command line's REF."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ref", nargs="?", default="HEAD", metavar="REF", help="commit (default: HEAD)")
    parser.add_argument(
        "--tier", default=",".join(TIERS), help="print these tiers only, by the file's marker (default: all)"
    )
    parser.add_argument(
        "--distance", action="store_true", help="print the number of imports and the tier too"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    arguments = parser.parse_args()
    tiers = arguments.tier.split(",")
    if unknown := set(tiers) - set(TIERS):
        parser.error(f"--tier {','.join(sorted(unknown))}: choose from {','.join(TIERS)}")
    root = arguments.root.resolve()
    changed = changed_since(root, arguments.ref)
    graph = ImportGraph(root, [path for path in changed if not (root / path).exists()])
    for one in select(graph, changed):
        if one.tier in tiers:
            print(f"{one.distance:3} {one.tier:8} {one.path}" if arguments.distance else one.path)


if __name__ == "__main__":
    main()
