"""The package is built in layers, and its imports point downward only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.imports import imported_by, modules

import kandinsky_dist

PACKAGE = Path(kandinsky_dist.__file__).parent
NAME = PACKAGE.name

# From the bottom up. A room imports itself and lower layers; rooms of one layer never import each other.
LAYERS = (
    {"errors"},
    {"optional"},
    {"config"},
    {"runtime"},
    {"data", "models", "optim", "telemetry"},
    {"objectives", "faults"},
    {"parallel"},
    {"checkpoint"},
    {"train", "precompute", "status", "submit"},
    {"estimate", "preflight"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}

TORCH_FREE = (
    "config/*.py",
    "data/plan.py",
    "data/manifest.py",
    "errors.py",
    "optional.py",
    "status/*.py",
    "submit/*.py",
)
BRINGS_TORCH = {
    "accelerate",
    "deepspeed",
    "diffusers",
    "peft",
    "torch",
    "torchvision",
    "transformers",
    "webdataset",
    "xformers",
}


MODULES = modules(PACKAGE, PACKAGE.parent)
IMPORTS = {
    name: imported_by(
        name, ast.walk(ast.parse(path.read_text())), MODULES, is_package=path.stem == "__init__"
    )
    for name, path in MODULES.items()
}


def room_of(module: str) -> str | None:
    """The layer list's name for a module; None for the package itself and for foreign packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == NAME and len(parts) > 1 else None


def upward_imports(name: str, imports: set[str]) -> list[str]:
    room = room_of(name)
    if room is None:
        return [f"{name} imports {other}" for other in imports if room_of(other) is not None]
    return [
        f"{name} imports {other}"
        for other in sorted(imports)
        if (target := room_of(other)) is not None and target != room and HEIGHT[target] >= HEIGHT[room]
    ]


def test_every_room_has_a_layer():
    rooms = {room for room in map(room_of, MODULES) if room is not None}
    assert rooms <= set(HEIGHT), f"not in LAYERS: {sorted(rooms - set(HEIGHT))}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    assert upward_imports(name, IMPORTS[name]) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kandinsky_dist.config.loader", "from kandinsky_dist.runtime import hashing"),
        ("kandinsky_dist.optim.schedule", "import kandinsky_dist.telemetry.meter"),
        ("kandinsky_dist.optim.schedule", "from ..telemetry.meter import Meter"),
        ("kandinsky_dist.optim.schedule", "from .. import telemetry"),
        ("kandinsky_dist.optim.schedule", "def f():\n    from kandinsky_dist.train import step"),
        ("kandinsky_dist", "from kandinsky_dist import errors"),
    ],
)
def test_an_upward_or_sideways_import_is_noticed(name, source):
    imports = imported_by(name, ast.walk(ast.parse(source)), MODULES, is_package=name == NAME)
    assert upward_imports(name, imports) != []


def closure(name: str) -> set[str]:
    """All modules of the package that importing `name` runs, or that its functions import later."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        waiting.extend(IMPORTS[module])
        waiting.append(module.rpartition(".")[0])  # a module's packages are imported before it
    return seen


TORCH_FREE_MODULES = [
    name
    for name, path in MODULES.items()
    if any(path.relative_to(PACKAGE).match(pattern) for pattern in TORCH_FREE)
]


@pytest.mark.parametrize("name", TORCH_FREE_MODULES)
def test_module_never_imports_torch_even_later(name):
    guilty = [
        f"{module} imports {other}"
        for module in sorted(closure(name))
        for other in IMPORTS[module]
        if other.partition(".")[0] in BRINGS_TORCH
    ]
    assert guilty == []


def test_importing_the_torch_free_modules_loads_no_torch():
    code = f"import sys, {', '.join(TORCH_FREE_MODULES)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
