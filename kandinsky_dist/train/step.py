"""One optimizer step, and the losses since the last log entry. No host sync in the step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.parallel.base import StepOutcome, Strategy


def train_step(
    strategy: Strategy,
    objective: Objective,
    model: nn.Module,
    microbatches: Sequence[Batch],
    *,
    learning_rate: float,
) -> tuple[Tensor, StepOutcome]:
    """Accumulates the micro-batches' gradients and updates the weights once.

    Returns:
        This rank's mean loss over its samples of the step (fp32, 0-d, on the device), and the outcome.
    """
    loss_sum = torch.zeros((), device=microbatches[0].positions_B.device)
    for index, batch in enumerate(microbatches):
        prepared = objective.prepare(batch)
        with strategy.accumulate(is_last=index == len(microbatches) - 1):
            loss = objective.losses(model, prepared).mean() / len(microbatches)
            strategy.backward(loss)
        loss_sum += loss.detach()
    return loss_sum, strategy.step(learning_rate=learning_rate)


class LossWindow:
    """Losses of the steps since the last log entry, kept on the device until they are read."""

    def __init__(self, pending: Sequence[float]) -> None:
        self._before = list(pending)
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Takes in this rank's loss of one step. No host sync."""
        self._losses.append(loss)

    def read(self) -> list[float]:
        """The global loss of each step of the window, in order. Host sync. Collective: call on every rank."""
        if self._losses:
            losses = torch.stack(self._losses)
            dist.all_reduce(losses)
            self._before += (losses / dist.get_world_size()).tolist()
            self._losses = []
        return list(self._before)

    def clear(self) -> None:
        """Starts a new window."""
        self._before, self._losses = [], []
