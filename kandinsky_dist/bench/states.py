"""Counts the bytes of tensors that live in this process, by what they are for.

Storages are counted, each once, so that views, flat buffers and shared memory cost what they cost. Python's
garbage collector knows every tensor object: what belongs to no class is not left out but counted as "other".
"""

import ctypes
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

CLASSES = ("weights", "masters", "moments", "gradients", "buckets", "other")
"""A storage of several classes counts in the first: masters that are the weights themselves are weights."""

# Where DeepSpeed's optimizer wrappers (0.18, 0.19) keep reduced gradients, and what they communicate through.
_GRADIENT_HOLDERS = (
    "all_grad_tensors",
    "averaged_gradients",
    "grads_in_partition",
    "grad_partitions_flat_buffer",
)
_BUCKET_HOLDERS = ("ipg_buckets",)

Storages = dict[int, torch.UntypedStorage]


@dataclass(frozen=True)
class Snapshot:
    """Storages of one device by address, by class; addresses are distinct over all classes."""

    by_class: Mapping[str, Storages]

    def num_bytes(self, name: str) -> int:
        """Bytes of a class."""
        return sum(storage.nbytes() for storage in self.by_class[name].values())

    def release(self) -> None:
        """Frees the memory of all classes but "other", whoever still refers to it."""
        for name in CLASSES[:-1]:
            for storage in self.by_class[name].values():
                storage.resize_(0)


def forget_the_past() -> None:
    """Leaves all objects that live now out of later snapshots, and out of the time that these take."""
    gc.collect()
    gc.freeze()


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Snapshot:
    """Sorts the living tensors of a device, without those that were there at the last `forget_the_past`.

    Args:
        model: what the strategy prepared: a module, or an engine around one.
        optimizer: the AdamW that updates the masters.
        device: tensors elsewhere are not looked at.
    """
    parameters = list(model.parameters())
    gc.collect()
    # Not its groups: ZeRO-3 exchanges their content during a step.
    masters = list(optimizer.state)
    wrapper = getattr(model, "optimizer", None)
    tensors: dict[str, Iterable[Any]] = {
        # ZeRO-3's share of a weight is in ds_tensor; the parameter itself is full-size while it is gathered.
        "weights": [*parameters, *(getattr(item, "ds_tensor", None) for item in parameters)],
        "masters": masters,
        # AdamW's step counts, 4 bytes a tensor, are with the moments.
        "moments": optimizer.state.values(),
        "gradients": [
            *(item.grad for item in (*parameters, *masters)),
            *(getattr(item, "grad_accum", None) for item in parameters),
            *_whole_gradients(model),
            *(getattr(wrapper, name, None) for name in _GRADIENT_HOLDERS),
        ],
        "buckets": [getattr(wrapper, name, None) for name in _BUCKET_HOLDERS],
        # isinstance would ask lazy modules and other proxies for their class, and wake them.
        "other": [item for item in gc.get_objects() if issubclass(type(item), Tensor)],
    }
    seen: set[int] = set()
    by_class: dict[str, Storages] = {}
    for name in CLASSES:
        found = _storages(tensors[name], device)
        by_class[name] = {address: storage for address, storage in found.items() if address not in seen}
        seen |= set(found)
    return Snapshot(by_class)


def _storages(holders: Iterable[Any], device: torch.device) -> Storages:
    storages = (tensor.untyped_storage() for tensor in _tensors(holders) if tensor.device == device)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _whole_gradients(model: nn.Module) -> Iterator[Tensor | None]:
    """Gradients that FSDP2 (torch 2.11 to 2.13) has not cut yet, while it accumulates."""
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for item in group.fsdp_params if group is not None else ():
            yield item.unsharded_accumulated_grad
            yield getattr(getattr(item, "_unsharded_param", None), "grad", None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers and in the plain attributes of what lies in them."""
    if isinstance(value, DTensor):
        yield value.to_local()
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "buffer"):  # DeepSpeed's bucket
        yield from _tensors(value.buffer)


def allocated_bytes(device: torch.device) -> int | None:
    """Memory that the process holds, counted by others than us: a check on the classes.

    Returns:
        On CUDA what torch's allocator has given out; on a CPU the process's anonymous resident memory, in
        which Python's own objects and the libraries' workspaces are too; None where neither is known.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what was freed
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)
