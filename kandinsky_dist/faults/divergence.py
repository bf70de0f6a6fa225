"""Whether a run is still learning, judged by the losses of its steps. No communication, no clock.

A step is bad if it is non-finite (it was skipped, or its loss is no number) or a spike (its loss lies far
above those of the healthy steps before it). A single bad step is forgiven; enough of one kind in a row are a
divergence.

In fp16 a step that was skipped while the loss scale could still be lowered is neither bad nor healthy, if its
loss is a number: the scale is looked for, and is found or at its least after a few steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from kandinsky_dist.config.schema import GuardConfig

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class Divergence:
    """A run that no longer learns.

    Attributes:
        since_step: first of the bad steps that no healthy one came after.
        reason: what was seen, for people.
    """

    since_step: int
    reason: str

    @property
    def last_healthy_step(self) -> int:
        """The weights that this step left are trusted."""
        return self.since_step - 1


@dataclass
class Health:
    """What the judgement remembers of the steps so far; saved with a run, so that restarts change nothing.

    Attributes:
        last_healthy_step: 0 before the first.
        num_nonfinite_steps: in a row, up to the last step judged.
        num_spike_steps: in a row, non-finite steps between them left out.
        losses: of the last healthy steps, oldest first; empty where spikes are not looked for.
    """

    last_healthy_step: int = 0
    num_nonfinite_steps: int = 0
    num_spike_steps: int = 0
    losses: list[float] = field(default_factory=list)

    def judge(
        self,
        guard: GuardConfig,
        first_step: int,
        losses: Sequence[float],
        skipped: Sequence[bool],
        rescaled: Sequence[bool],
    ) -> Divergence | None:
        """Takes in steps one after another.

        Args:
            guard: the rules.
            first_step: number of the first of the steps; they follow those that were judged before.
            losses: of each step, over all ranks.
            skipped: whether the optimizer left the step out.
            rescaled: whether it did so and lowered the loss scale.

        Returns:
            The divergence that became certain first, the later steps not looked at; None for a healthy run.
        """
        del self.losses[: -guard.spike_window_steps]  # a window that was made smaller
        steps = zip(losses, skipped, rescaled, strict=True)
        for step, (loss, was_skipped, was_rescaled) in enumerate(steps, start=first_step):
            if was_rescaled and math.isfinite(loss):
                continue
            if was_skipped or not math.isfinite(loss):
                reason = self._take_nonfinite(guard)
            elif (limit := self._limit(guard)) is not None and loss > limit:
                reason = self._take_spike(guard, loss, limit)
            else:
                reason = None
                self._take_healthy(guard, step, loss)
            if reason is not None:
                return Divergence(self.last_healthy_step + 1, reason)
        return None

    def _take_nonfinite(self, guard: GuardConfig) -> str | None:
        self.num_nonfinite_steps += 1
        if not 0 < guard.max_nonfinite_steps <= self.num_nonfinite_steps:
            return None
        return f"{self.num_nonfinite_steps} non-finite steps in a row"

    def _take_spike(self, guard: GuardConfig, loss: float, limit: float) -> str | None:
        self.num_nonfinite_steps = 0
        self.num_spike_steps += 1
        if self.num_spike_steps < guard.spike_patience_steps:
            return None
        return (
            f"{self.num_spike_steps} losses in a row above {limit:.4g}, the last {loss:.4g}, where the "
            f"median of {len(self.losses)} healthy steps is {median(self.losses):.4g}"
        )

    def _take_healthy(self, guard: GuardConfig, step: int, loss: float) -> None:
        self.last_healthy_step = step
        self.num_nonfinite_steps = self.num_spike_steps = 0
        if guard.spike_threshold > 0:
            self.losses.append(loss)
            del self.losses[: -guard.spike_window_steps]
        else:
            self.losses.clear()

    def _limit(self, guard: GuardConfig) -> float | None:
        """The loss above which a step is a spike, or None as long as nothing can be said."""
        if guard.spike_threshold == 0 or len(self.losses) < guard.spike_window_steps:
            return None
        middle = median(self.losses)
        scale = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self.losses)
        return middle + guard.spike_threshold * scale
