"""torch.compile by region: the layers that repeat, not whole networks.

A region's graph serves every layer of its kind, so the prior's twenty layers cost one compilation. Shapes are
static: the few numbers of tokens and aspect ratios that occur get a graph each, with kernels for them. Only
`forward` is wrapped, on the instance: parameter names do not change, and the hooks of engines, which gather
weights before a block and reduce gradients behind it, stay outside the graph. Recomputation in backward is
part of the graph, so it is switched on before.
"""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.blocks import blocks

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

MAX_GRAPHS = 512
"""Graphs of one kind of layer. Nine aspect ratios of three U-Net blocks of a class, in training and in
validation, are 54. The longest text of a prior's micro-batch has ten lengths, and the mean 36 values, two
tokens apart: a few dozen pairs occur, as the mean is at most the longest and of many captions hardly moves.
torch's own limit is 8; beyond it a whole graph is refused with an error."""

COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "cc", "clang"))}
"""Device -> variable that names the compiler which generated code needs on the host, and the usual names."""


def prepare_compiler(device: torch.device, cache_dir: Path) -> None:
    """Keeps compiled code in a folder and makes room for all shapes that occur.

    Args:
        device: that code is generated for.
        cache_dir: for all ranks and later starts.

    Raises:
        ConfigError: there is no compiler.
    """
    variable, names = COMPILERS[device.type]
    if variable in os.environ:
        names = tuple(os.environ[variable].split()[:1])
    if not any(map(shutil.which, names)):
        raise ConfigError(
            f"parallel.compile=True needs {' or '.join(names)} on PATH and none is here: install one, or "
            "parallel.compile=false"
        )
    os.environ[CACHE_VARIABLE] = str(cache_dir.absolute())
    # Half of a process's imports, and a process that compiles nothing needs none of it.
    from torch._dynamo import config as dynamo_config

    dynamo_config.recompile_limit = MAX_GRAPHS


def compile_blocks(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles a trained network's blocks, each when it first runs.

    Call it after `enable_gradient_checkpointing` and before an engine takes the module.
    """
    for block in blocks(module):
        _compile(block, backend)


def compile_encoder(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles a frozen encoder: CLIP's layers, or MoVQ's convolutions as one."""
    layers = [layer for layer in module.modules() if type(layer).__name__ == "CLIPEncoderLayer"]
    for layer in layers or [module.get_submodule("encoder")]:
        _compile(layer, backend)


def num_graphs() -> int:
    """Return how many graphs this process has compiled; constant once every shape has occurred."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compile(layer: nn.Module, backend: str) -> None:
    if not isinstance(layer.forward, _Compiled):
        layer.forward = _Compiled(layer.forward, backend)


class _Compiled:
    """A compiled forward. A deep copy of its layer is not: code belongs to the layer it is made of."""

    def __init__(self, forward: Callable[..., Any], backend: str) -> None:
        self._forward = forward
        # A part that cannot be compiled is an error, not a slower layer.
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)
