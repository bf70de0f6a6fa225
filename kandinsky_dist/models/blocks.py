"""A network's blocks: the units that are recomputed, compiled or sharded, and which attention they run."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.optional import require


def blocks(module: nn.Module) -> list[nn.Module]:
    """The network's repeated units in the order in which forward runs them.

    The prior's are its transformer layers. The U-Net's are its down, middle and up blocks: their residual and
    attention layers hand skip connections to each other, so the block is the smallest unit with one way in.
    """
    layers = getattr(module, "transformer_blocks", None)
    if layers is not None:
        return list(layers)
    return [*module.down_blocks, module.mid_block, *module.up_blocks]  # type: ignore[list-item, misc]


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Makes backward recompute each layer rather than keep its activations; parameter names do not change.

    Dropout, if any, is replayed. Gradients are those without it. Calling it twice is calling it once.

    diffusers refuses for the prior, and recomputes only the residual layers of this U-Net, not its attention.
    So the layers' `forward` is wrapped on the instance: no submodule is added, hence no name.
    """
    for layer in _layers(module):
        if not isinstance(layer.forward, _Recomputed):
            layer.forward = _Recomputed(layer.forward)


def _layers(module: nn.Module) -> list[nn.Module]:
    """What is worth recomputing alone: transformer layers; residual and attention layers of the U-Net."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    if hasattr(module, "transformer_blocks"):
        return blocks(module)
    return [layer for layer in module.modules() if isinstance(layer, (ResnetBlock2D, Attention))]


class _Recomputed:
    """A forward that saves only its inputs while gradients are recorded."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Setting -> the one kernel that torch may then use; with "sdpa" it chooses by itself."""


def set_attention(module: nn.Module, attention: str) -> None:
    """Chooses the attention kernels: torch's own (the default), one kind of them, or those of xformers.

    Call it before `enable_gradient_checkpointing`: what is recomputed in backward must take the same kernels.

    Raises:
        ConfigError: xformers is not installed, or there is no GPU for it.
    """
    if attention == "sdpa":
        return  # what diffusers builds
    if attention in SDPA_KERNELS:
        for layer in _layers(module):
            layer.forward = _WithKernel(layer.forward, SDPA_KERNELS[attention])
        return
    require("xformers", extra="xformers", why="parallel.attention=xformers")
    if not torch.cuda.is_available():
        raise ConfigError("parallel.attention=xformers needs a CUDA GPU and none is here; use sdpa")
    module.enable_xformers_memory_efficient_attention()  # type: ignore[operator]


def check_attention(attention: str, device: torch.device, dtype: torch.dtype, *, is_masked: bool) -> None:
    """Tries the kernel that `set_attention` will ask for, forward and backward, on a few values.

    Args:
        attention: parallel.attention.
        device: of the run.
        dtype: that the products run in.
        is_masked: whether the network masks some tokens.

    Raises:
        ConfigError: torch has no such kernel for these.
    """
    if attention not in SDPA_KERNELS:
        return
    query_BHLD = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype, requires_grad=True)
    mask_BHLL = torch.zeros(1, 1, 8, 8, device=device, dtype=dtype) if is_masked else None
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPA_KERNELS[attention]):
            warnings.simplefilter("ignore")  # torch's reasons, of which some are of kernels not asked for
            scaled_dot_product_attention(query_BHLD, query_BHLD, query_BHLD, mask_BHLL).sum().backward()
    except RuntimeError as error:
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"parallel.attention={attention} has no kernel here for {kind} on {device.type}"
            f"{' with a mask, which the prior needs' if is_masked else ''}; use sdpa"
        ) from error


class _WithKernel:
    """A layer's forward, in which torch may use one kind of kernel only."""

    def __init__(self, forward: Callable[..., Any], kernel: SDPBackend) -> None:
        self.forward = forward
        self.kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(self.kernel):
            return self.forward(*args, **kwargs)
