"""Static imports: dotted names of the modules below a folder, and the names that a source imports."""

import ast
from collections.abc import Container, Iterable
from pathlib import Path


def modules(folder: Path, base: Path) -> dict[str, Path]:
    """Return dotted name -> file of every module below `folder`; names are relative to `base`."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_by(
    name: str, nodes: Iterable[ast.AST], known: Container[str], *, is_package: bool = False
) -> set[str]:
    """Return the dotted names that a module imports anywhere, in functions and for the type checker too.

    Args:
        name: dotted name of the module, for its relative imports.
        nodes: of its syntax tree, or of a part of it, as `ast.walk` yields them.
        known: dotted names of modules; `from a import b` imports a.b if that is one of them, otherwise a.
        is_package: the module is an `__init__.py`.
    """
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".") if is_package else name.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            found.update(
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names
            )
    return found
