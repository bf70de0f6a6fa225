"""One optimizer step, and the losses since the last log entry. No host sync in the step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from kandinsky_dist.objectives.base import Objective, Prepared
from kandinsky_dist.parallel.base import StepOutcome, Strategy


class Watched(Protocol):
    """Who wants to know where a step is. No host sync."""

    def enter(self, phase: str) -> None:
        """Something else is done from now on."""

    def alone(self) -> AbstractContextManager[None]:
        """What is inside is done by each rank for itself."""


class _Unwatched:
    def enter(self, phase: str) -> None:
        pass

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()


UNWATCHED: Watched = _Unwatched()


def train_step(
    strategy: Strategy,
    objective: Objective,
    model: nn.Module,
    microbatches: Sequence[Prepared],
    *,
    learning_rate: float,
    watch: Watched = UNWATCHED,
    beside: Callable[[], None] | None = None,
) -> tuple[Tensor, StepOutcome]:
    """Accumulates the micro-batches' gradients and updates the weights once.

    Its parts are the ranges "forward", "backward" and "optimizer" of a profile.

    Args:
        strategy: the engine.
        objective: the loss.
        model: what the engine's `prepare` returned.
        microbatches: this rank's.
        learning_rate: of the step.
        watch: is told where the step is.
        beside: called once all but the update is queued: what it computes on another stream runs beside the
            step, even where the engine waits for the device before its update, as DeepSpeed does.

    Returns:
        This rank's mean loss over its samples of the step (fp32, 0-d, on the device), and the outcome.
    """
    loss_sum = torch.zeros((), device=microbatches[0].positions_B.device)
    for index, prepared in enumerate(microbatches):
        with strategy.accumulate(is_last=index == len(microbatches) - 1):
            with record_function("forward"), nullcontext() if strategy.gathers_weights else watch.alone():
                loss = objective.losses(model, prepared).mean() / len(microbatches)
            with record_function("backward"):
                strategy.backward(loss)
        loss_sum += loss.detach()
    if beside is not None:
        beside()
    watch.enter("step")
    with record_function("optimizer"):
        return loss_sum, strategy.step(learning_rate=learning_rate)


class LossWindow:
    """Losses of the steps since the last log entry, kept on the device until they are read.

    Args:
        pending: global losses of steps that an earlier window had taken in.
        skipped: whether these were skipped.
        rescaled: whether they were, and the loss scale lowered.
    """

    def __init__(self, pending: Sequence[float], skipped: Sequence[bool], rescaled: Sequence[bool]) -> None:
        self._losses_before = list(pending)
        self._skipped_before = list(skipped) or [False] * len(pending)
        self._rescaled_before = list(rescaled) or [False] * len(pending)
        self._steps: list[Tensor] = []

    def add(self, loss: Tensor, outcome: StepOutcome) -> None:
        """Takes in this rank's loss of one step, and whether it was skipped. No host sync."""
        self._steps.append(torch.stack([loss, outcome.skipped, outcome.rescaled]))

    def read(self) -> tuple[list[float], list[bool], list[bool]]:
        """The global loss of each step of the window, in order; whether it was skipped; whether rescaled.

        Host sync. Collective: call on every rank.
        """
        if self._steps:
            losses, skipped, rescaled = torch.stack(self._steps).T.contiguous()
            dist.all_reduce(losses)  # the optimizers have agreed on what they skip
            self._losses_before += (losses / dist.get_world_size()).tolist()
            self._skipped_before += (skipped > 0).tolist()
            self._rescaled_before += (rescaled > 0).tolist()
            self._steps = []
        return list(self._losses_before), list(self._skipped_before), list(self._rescaled_before)

    def clear(self) -> None:
        """Starts a new window."""
        self._losses_before, self._skipped_before, self._rescaled_before, self._steps = [], [], [], []
