"""FLOPs, counted on tensors that hold no memory: a full-size model on any machine.

A multiplication and an addition are two FLOPs. Matrix products, convolutions and attention are counted;
norms, activations and sums are not, which is what published figures mean by model FLOPs. Causal attention
counts as full attention, for the same reason, and what fused attention computes again in backward does not
count.

Only forward runs. A product's backward is one more product of its size for each operand that wants a
gradient, so it is counted with it: half the work of a count, which every start of a run waits for.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def count_flops(function: Callable[[], Any]) -> float:
    """Counts the FLOPs of `function`, and of the backward of what it computes, without computing it.

    Args:
        function: makes its own models and tensors, which get no memory, or uses some that have none
            (`without_memory`). It must not branch on the value of a tensor, and need not call backward:
            under `torch.no_grad` there is none to count.

    Returns:
        FLOPs of the whole call, so of every sample in its batch.
    """
    with torch.device("meta"), Products() as products:
        function()
    return products.flops


class Products(TorchFunctionMode):
    """Counts the products of what runs inside, under a fake mode that is already on too.

    Norms, activations and dropout are passed over, as they change no shape; linear functions and attention
    give an empty tensor of theirs. Torch's own look at such shapes would take most of the time.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        # Compiled code would want real tensors, and show no products.
        self._eager = torch.compiler.set_stance("force_eager")

    def __enter__(self) -> "Products":
        self._eager.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch, and counts it if it is a product."""
        kwargs = kwargs or {}
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if func in _SHAPELESS and _adds_no_gradient(tensors):
            return args[0]
        if func in _ATTENTION:
            query_BHQC, key_BHSC, value_BHSC = tensors[:3]
            size = prod(query_BHQC.shape[:-1]) * key_BHSC.shape[-2]
            self._add(size * key_BHSC.shape[-1], query_BHQC.requires_grad, key_BHSC.requires_grad)
            weights_need_grad = query_BHQC.requires_grad or key_BHSC.requires_grad
            self._add(size * value_BHSC.shape[-1], weights_need_grad, value_BHSC.requires_grad)
            return _made_of(tensors, (*query_BHQC.shape[:-1], value_BHSC.shape[-1]))
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        left, right = tensors[_PRODUCTS[func] :][:2]
        if func is functional.linear:
            result = _made_of(tensors, (*left.shape[:-1], right.shape[0]))
        else:
            result = func(*args, **kwargs)
        inner = right[0].numel() if func in _CONVOLUTIONS else left.shape[-1]
        self._add(result.numel() * inner, left.requires_grad, right.requires_grad)
        return result

    def _add(self, num_multiplications: int, *operands_require_grad: bool) -> None:
        """A product, and in backward one of the same size for each operand with a gradient."""
        num_backward = sum(operands_require_grad) if torch.is_grad_enabled() else 0
        self.flops += 2.0 * num_multiplications * (1 + num_backward)


_ATTENTION = {functional.scaled_dot_product_attention}
_CONVOLUTIONS = {functional.conv1d, functional.conv2d, functional.conv3d}
# Product -> place of its first operand: what is added to it comes before.
_PRODUCTS = {
    **dict.fromkeys((functional.linear, *_CONVOLUTIONS), 0),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), 0),
    **dict.fromkeys((torch.bmm, Tensor.bmm), 0),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), 1),
}
_SHAPELESS = {
    functional.layer_norm,
    functional.group_norm,
    functional.silu,
    functional.gelu,
    functional.dropout,
    functional.softmax,
    torch.sigmoid,
}


def _adds_no_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether the result requires a gradient just where the first argument does."""
    return tensors[0].requires_grad or not any(item.requires_grad for item in tensors)


def _made_of(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """A product's result: of the type of its weights, and with a gradient where an operand has one."""
    result = tensors[1].new_empty(shape)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result = result.requires_grad_().clone()  # no leaf: these cannot be changed in place
    return result


def without_memory(module: nn.Module) -> nn.Module:
    """A copy of a module in which no tensor holds memory."""
    replaced: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        for tensor in module.parameters()
    }
    replaced |= {id(tensor): tensor.to("meta") for tensor in module.buffers()}
    return copy.deepcopy(module, replaced)
