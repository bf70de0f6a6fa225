"""Learning rate as a pure function of the optimizer step: nothing to save, nothing to step."""

import math
from typing import Literal

Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine"]


def learning_rate(
    step: int, *, peak: float, scheduler: Scheduler, num_warmup_steps: int, num_steps: int
) -> float:
    """Learning rate of one optimizer step; accumulation and world size have no part in it.

    Args:
        step: optimizer steps taken before this one, so the first is step 0.
        peak: rate after the warm-up.
        scheduler: "constant" has no warm-up; "linear" and "cosine" fall to 0 at `num_steps`.
        num_warmup_steps: optimizer steps of linear rise; the first of them has rate 0.
        num_steps: optimizer steps of the whole run.

    Source: the shapes of `diffusers.optimization.get_scheduler` under the same names.
    """
    if scheduler == "constant":
        return peak
    if step < num_warmup_steps:
        return peak * step / num_warmup_steps
    if scheduler == "constant_with_warmup":
        return peak
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if scheduler == "linear":
        return peak * max(0.0, 1.0 - progress)
    # Past the end the cosine would rise again; a run that is lengthened later must not meet that.
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
