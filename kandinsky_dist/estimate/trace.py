"""What a step keeps in memory, found by running it on tensors that hold none.

`torch._subclasses.FakeTensorMode` runs the real forward and backward on shapes alone; a dispatch mode beside
it sees every storage begin and end. The same mode counts real tensors, which is how it is tested.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of what CUDA's autocast runs in fp32 (torch's documentation, "CUDA Ops that can autocast to float32"), these
# are in the networks and are left in bf16 by the CPU's autocast, whose shapes are used here.
_FP32_UNDER_CUDA_AUTOCAST = (nn.GroupNorm, nn.LayerNorm)


class Living(TorchDispatchMode):
    """Counts the bytes of storages that operations make, for as long as these live.

    Attributes:
        num_bytes: what lives now.
        peak_bytes: the most that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and takes in the storages that are new in its results."""
        # A result may be an argument, or a view of one, that was made before counting began.
        before = {_address(item) for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        results = func(*args, **(kwargs or {}))
        for item in tree_leaves(results):
            if isinstance(item, Tensor) and _address(item) not in before:
                self._take(item.untyped_storage())
        return results

    def _take(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def forget(_: Any) -> None:
            self.num_bytes -= size
            self._known.pop(address, None)

        self._known[address] = weakref.ref(storage, forget)
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _norm_as_on_cuda(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of a norm: its input in fp32 where autocast is on, in a recomputation too."""
    if not torch.is_autocast_enabled("cpu"):
        return args
    return tuple(item.float() if isinstance(item, Tensor) else item for item in args)


@dataclass(frozen=True)
class Trace:
    """Bytes of a micro-batch over what was there before it: weights, their gradients, the batch.

    Attributes:
        kept: live between forward and backward.
        peak: the most at one time in forward and backward.
    """

    kept: int
    peak: int


def trace(
    model: nn.Module, losses: Callable[[nn.Module], Tensor], *, autocast: torch.dtype | None = None
) -> Trace:
    """Runs forward and backward once and counts what they keep.

    Gradients are there before, as they are from a step's second micro-batch on and in engines with buckets:
    they are states, not activations.

    Args:
        model: in training mode.
        losses: the model's losses of a micro-batch; called once.
        autocast: type that the model's forward is cast to as a GPU's would be; None casts nothing.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with ExitStack() as stack:
        if autocast is not None:
            for module in model.modules():
                if isinstance(module, _FP32_UNDER_CUDA_AUTOCAST):
                    stack.callback(module.register_forward_pre_hook(_norm_as_on_cuda).remove)
            stack.callback(setattr, model, "forward", model.forward)
            model.forward = torch.autocast("cpu", autocast)(model.forward)
        gc.collect()
        living = stack.enter_context(Living())
        loss = losses(model).mean()
        kept = living.num_bytes
        loss.backward()
    return Trace(kept, living.peak_bytes)


def transient_bytes(call: Callable[[], Any]) -> int:
    """The most that lives at one time in a call that keeps nothing for backward, its result included."""
    gc.collect()
    with Living() as living, torch.no_grad():
        call()
    return living.peak_bytes
