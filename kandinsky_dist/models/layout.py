"""channels_last: pictures lie in memory pixel by pixel, as the fast convolutions of GPUs want them.

A trained network keeps its weights as they are and gets its activations so. Its weights are cut into flat
ranges, by engines and by checkpoints, and the values of a weight in channels_last do not lie in the order of
its indices: a flat view of it raises, and engines that flatten weights themselves silently undo the layout.
The convolution brings the weight into the activations' layout on its way: one pass over the weights, which
is little beside the pass over the pictures, and in a compiled block is one with their cast to half precision.
A frozen network has no such bounds: its weights are laid out once.

An attention layer answers in channels_last by itself, for it had turned pictures into tokens, and what comes
after it follows. So each convolution is given its input in the layout of the run, whichever that is: a CPU is
slower in channels_last, and would do those convolutions so and copy their weights and gradients there and
back.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def is_channels_last(chosen: bool | None) -> bool:
    """What `parallel.channels_last` comes to on this machine; None: where there is a GPU."""
    return torch.cuda.is_available() if chosen is None else chosen


def lay_out_activations(module: nn.Module, *, channels_last: bool) -> None:
    """Gives every convolution of a trained network its input in one layout, so it answers in it too."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.forward, _LaidOut):
            layer.forward = _LaidOut(layer.forward, memory_format)  # type: ignore[method-assign, assignment]


def lay_out_weights(module: nn.Module) -> None:
    """Brings a frozen network's weights into channels_last; its convolutions follow their weights."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _LaidOut:
    """A convolution's forward on an input that it lays out first."""

    def __init__(self, forward: Callable[[Tensor], Tensor], memory_format: torch.memory_format) -> None:
        self.forward = forward
        self.memory_format = memory_format

    def __call__(self, input_BCHW: Tensor) -> Tensor:
        return self.forward(input_BCHW.contiguous(memory_format=self.memory_format))
