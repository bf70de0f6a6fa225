"""FLOPs, counted on tensors that hold no memory: a full-size model on any machine.

A multiplication and an addition are two FLOPs. Matrix products, convolutions and attention are counted;
norms, activations and sums are not, which is what published figures mean by model FLOPs. Causal attention
counts as full attention, for the same reason, and what fused attention computes again in backward does not
count.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], Any]) -> float:
    """Counts the FLOPs of `function`, backward passes in it included, without computing it.

    Args:
        function: makes its own models and tensors, which get no memory, or uses some that have none
            (`without_memory`). It must not branch on the value of a tensor.

    Returns:
        FLOPs of the whole call, so of every sample in its batch.
    """
    with torch.device("meta"), flop_counter() as counter:
        function()
    return float(counter.get_total_flops())


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """A context that counts what runs inside, under a fake mode that is already on too."""
    counter = FlopCounterMode(display=False)
    # Attention as matrix products, which are counted one by one: no kernel of it needs a formula.
    # Compiled code would want real tensors, and counts nothing.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def without_memory(module: nn.Module) -> nn.Module:
    """A copy of a module in which no tensor holds memory."""
    replaced: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        for tensor in module.parameters()
    }
    replaced |= {id(tensor): tensor.to("meta") for tensor in module.buffers()}
    return copy.deepcopy(module, replaced)
