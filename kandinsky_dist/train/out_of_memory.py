"""Memory that ran out: what took it, and what to change."""

import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import OutOfMemoryError, is_out_of_memory
from kandinsky_dist.parallel.base import Strategy
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.telemetry.meter import peak_memory_bytes

_SHARDING = {"ddp": "fsdp2 or zero2", "zero0": "fsdp2 or zero2", "zero1": "zero2 or zero3", "zero2": "zero3"}


@contextmanager
def explained_out_of_memory(
    config: Config, process: Process, held: Callable[[], dict[str, Iterable[Any]]]
) -> Iterator[None]:
    """Turns an allocation that failed inside into one line with a breakdown and the remedy.

    Args:
        config: of the run.
        process: this rank.
        held: what memory is for -> tensors, where a storage counts in the first that has it.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = f"out of memory on rank {process.rank} with {_batch(config)}: {_breakdown(process, held)}"
        raise OutOfMemoryError(f"{line}; {remedy(config)}") from error


def held_by(strategy: Strategy, model: nn.Module, objective: Any, averages: Any) -> dict[str, Iterable[Any]]:
    """The lasting tensors of a run on this rank, for `explained_out_of_memory`."""
    parameters = list(model.parameters())
    fragments = strategy.fragments()
    encoders = [item for item in vars(objective).values() if isinstance(item, nn.Module)]
    return {
        # ZeRO-3's share of a weight is in ds_tensor.
        "weights": [*parameters, *(getattr(item, "ds_tensor", None) for item in parameters)],
        "frozen encoders": [item for encoder in encoders for item in encoder.parameters()],
        "gradients": [item.grad for item in parameters],
        "optimizer": [
            tensor for item in fragments for tensor in (item.master, item.exp_avg, item.exp_avg_sq)
        ],
        "averages": [tensor for tensors in averages.tensors().values() for tensor in tensors],
    }


def remedy(config: Config) -> str:
    """What to change, the cheapest first."""
    micro = config.data.micro_batch_size
    found = []
    if micro > 1:
        lower = next(size for size in range(micro // 2, 0, -1) if micro % size == 0)
        found.append(
            f"data.micro_batch_size={lower} (the global batch stays {config.data.global_batch_size})"
        )
    if not config.parallel.gradient_checkpointing:
        found.append("parallel.gradient_checkpointing=true")
    if config.parallel.strategy in _SHARDING:
        found.append(f"parallel.strategy={_SHARDING[config.parallel.strategy]}")
    return "try, in this order: " + ", ".join([*found, "more GPUs"])


def _batch(config: Config) -> str:
    return f"data.micro_batch_size={config.data.micro_batch_size}"


def _breakdown(process: Process, held: Callable[[], dict[str, Iterable[Any]]]) -> str:
    try:
        peak = peak_memory_bytes(process.device)
        seen: set[int] = set()
        sizes = {name: _new_bytes(tensors, process.device, seen) for name, tensors in held().items()}
    except Exception as error:  # there is no memory even for that
        return f"what took it cannot be counted ({type(error).__name__})"
    sizes["activations and the rest"] = max(0, peak - sum(sizes.values()))
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items() if size)
    return f"peak {peak / 2**30:.2f} of {_capacity_bytes(process.device) / 2**30:.2f} GiB ({parts})"


def _new_bytes(tensors: Iterable[Any], device: torch.device, seen: set[int]) -> int:
    """Bytes of the storages on a device that were not seen before."""
    total = 0
    for value in tensors:
        tensor = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(tensor, Tensor) and tensor.device == device:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _capacity_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical if limit == resource.RLIM_INFINITY else min(limit, physical)
