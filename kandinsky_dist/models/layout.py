"""channels_last: pictures lie in memory pixel by pixel, as the fast convolutions of GPUs want them.

A trained network keeps its weights as they are and gets its activations so. Its weights are cut into flat
ranges, by engines and by checkpoints, and the values of a weight in channels_last do not lie in the order of
its indices: a flat view of it raises, and engines that flatten weights themselves silently undo the layout.
The convolution brings the weight into the activations' layout on its way: one pass over the weights, which
is little beside the pass over the pictures, and in a compiled block is one with their cast to half precision.
A frozen network has no such bounds: its weights are laid out once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def is_channels_last(chosen: bool | None) -> bool:
    """What `parallel.channels_last` comes to on this machine; None: where there is a GPU."""
    return torch.cuda.is_available() if chosen is None else chosen


def lay_out_activations(module: nn.Module) -> None:
    """Gives every convolution of a trained network its input in channels_last, so it answers in it too."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.forward, _ChannelsLast):
            layer.forward = _ChannelsLast(layer.forward)  # type: ignore[method-assign, assignment]


def lay_out_weights(module: nn.Module) -> None:
    """Brings a frozen network's weights into channels_last; its convolutions follow their weights."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _ChannelsLast:
    """A convolution's forward on an input that it lays out first."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, input_BCHW: Tensor) -> Tensor:
        return self.forward(input_BCHW.contiguous(memory_format=torch.channels_last))
