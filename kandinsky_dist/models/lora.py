"""LoRA as a transform of a network: adapters on every attention projection, all else frozen."""

import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.models.atomic import new_folder
from kandinsky_dist.models.load import ModelSource
from kandinsky_dist.models.zero_init import outside_zero_init
from kandinsky_dist.optional import require

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
UNET_PROJECTIONS = (*PROJECTIONS, "add_k_proj", "add_v_proj")


def add_adapters(module: nn.Module, rank: int, *, seed: int = 0) -> None:
    """Adds trainable adapters of the given rank and freezes every other parameter.

    The output does not change: the second factor starts at zero. The first is drawn from `seed` alone, so
    that ranks that build the same network hold the same adapters. Collective where the parameters are already
    partitioned by ZeRO-3.

    Raises:
        ConfigError: peft is not installed, or the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"model.lora_rank={rank} must be at least 1")
    peft = require("peft", extra="lora", why="model.variant=lora")
    targets = PROJECTIONS if hasattr(module, "transformer_blocks") else UNET_PROJECTIONS
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        module.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and not parameter.is_meta:
            with _whole(parameter):
                _initialise(name, parameter, seed)


def _initialise(name: str, parameter: nn.Parameter, seed: int) -> None:
    """LoRA's usual start, drawn by name and not by the order in which peft visits the modules.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; the bound is that of torch's linear layers.
    """
    if "lora_B" in name:
        parameter.data.zero_()
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    bound = parameter.shape[1] ** -0.5
    parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Gathers a parameter that `deepspeed.zero.Init` has cut into pieces."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    deepspeed = require("deepspeed", extra="deepspeed", why="parallel.strategy=zero3")
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return gathered


def under_adapters(source: ModelSource, rank: int) -> dict[str, Tensor]:
    """The network's own weights, by their names in the network with adapters."""
    weights = source.state_dict()
    names = (name for name in _meta_module(source, rank).state_dict() if "lora_" not in name)
    return {name: weights[name.replace(".base_layer.", ".")] for name in names}


def adapter_shapes(source: ModelSource, rank: int) -> dict[str, torch.Size]:
    """The adapters' names in the network with adapters, and their shapes."""
    state = _meta_module(source, rank).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if "lora_" in name}


def _meta_module(source: ModelSource, rank: int) -> nn.Module:
    """The network with adapters, without memory."""
    with outside_zero_init(), torch.device("meta"):
        module = source.build()
        add_adapters(module, rank)
    return module


def save_adapters(source: ModelSource, rank: int, state_dict: Mapping[str, Tensor], out: Path) -> None:
    """Writes a folder that diffusers' `load_lora_adapter(out, prefix=None, weight_name=...)` takes.

    Args:
        source: the network under the adapters; its weights are not read.
        rank: the adapters' rank.
        state_dict: every adapter's tensors, by the names of the network with adapters; others are left out.
        out: new or empty folder; gets pytorch_lora_weights.safetensors.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    module = _meta_module(source, rank)
    adapters = {name: tensor for name, tensor in state_dict.items() if "lora_" in name}
    expected = adapter_shapes(source, rank)
    found = {name: tensor.shape for name, tensor in adapters.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"{out}: the adapters are not of rank {rank} for {source.path}: {name} is "
            f"{list(found.get(name, []))}, must be {list(expected.get(name, []))}"
        )
    adapters = {name: tensor.detach().to("cpu", torch.float32).clone() for name, tensor in adapters.items()}
    module.load_state_dict(adapters, strict=False, assign=True)
    with new_folder(out) as partial:
        module.save_lora_adapter(partial, weight_name=WEIGHT_NAME)  # type: ignore[operator]
        (partial / WEIGHT_NAME).chmod(0o666 & partial.stat().st_mode)
