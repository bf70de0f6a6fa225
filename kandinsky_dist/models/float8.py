"""Matrix products of the prior in float8, through torchao."""

from typing import Any

import torch
from torch import nn

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.blocks import blocks
from kandinsky_dist.optional import require

MULTIPLE = 16
"""What the sides of a matrix must be a multiple of, for a GPU to multiply it in float8."""
LEAST_CAPABILITY = (8, 9)
"""Ada; Hopper is (9, 0)."""


def refuse_unless_here() -> None:
    """Looks for what float8 needs.

    Raises:
        ConfigError: torchao is not installed, or this GPU has no float8.
    """
    require("torchao", extra="float8", why="parallel.float8=true")
    if not torch.cuda.is_available():
        raise ConfigError("parallel.float8=true needs a CUDA GPU and none is here: leave it false")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, found = torch.cuda.get_device_name(), ".".join(map(str, capability))
        raise ConfigError(
            f"parallel.float8=true needs compute capability 8.9 (Ada, Hopper) or more, {name} has {found}: "
            "leave it false"
        )


def use_float8(module: nn.Module, **options: Any) -> None:
    """Lets the linears of the network's blocks multiply in float8, forward and backward.

    Each operand is scaled by its own largest value. Weights stay parameters of the same names in the type
    that they have, so optimizer, fragments and checkpoints do not know of it.

    Args:
        module: changed in place. What lies outside its blocks, which is small, is left as it is.
        options: of torchao's Float8LinearConfig, over those used here.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Samples x tokens is the inner side of the products that give gradients of weights: any number of them.
    config = Float8LinearConfig(**{"pad_inner_dim": True, **options})
    for block in blocks(module):
        convert_to_float8_training(
            block, module_filter_fn=lambda layer, _name: _is_suited(layer), config=config
        )


def _is_suited(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not any(side % MULTIPLE for side in layer.weight.shape)
