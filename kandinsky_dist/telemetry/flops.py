"""FLOPs of a forward pass, counted on tensors that hold no memory: a full-size model on any machine.

A multiplication and an addition are two FLOPs. Matrix products, convolutions and attention are counted;
norms, activations and sums are not, which is what published figures mean by model FLOPs. Causal attention
counts as full attention, for the same reason.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# torch (seen in 2.13) has no formula for these and would count their attention as nothing. The other fused
# kernels are in its own table, and the plain one is made of matrix products, which are counted one by one.
_MISSING_FORMULAS = {
    getattr(torch.ops.aten, name): _attention_flops
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
}


def count_forward_flops(function: Callable[[], Any]) -> float:
    """Counts the FLOPs of `function` without computing it.

    Args:
        function: runs a forward pass. Models and tensors that it makes hold no memory; those that it closes
            over are used for their shapes only. It must not branch on the value of a tensor.

    Returns:
        FLOPs of the whole call, so of every sample in its batch.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), flop_counter() as counter, torch.no_grad():
        function()
    return float(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """A context that counts what runs inside, under a fake mode that is already on too."""
    return FlopCounterMode(display=False, custom_mapping=_MISSING_FORMULAS)
