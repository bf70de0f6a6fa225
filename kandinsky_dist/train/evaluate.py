"""Held-out figures: the same samples, noise and timesteps each time, on every rank at once."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kandinsky_dist.data.loader import Loader
from kandinsky_dist.objectives.base import Objective


@torch.no_grad()
def evaluate(model: nn.Module, objective: Objective, loader: Loader, num_samples: int) -> dict[str, float]:
    """Means over the first `num_samples` held-out samples, over all ranks.

    Every rank runs the same number of forward passes, as engines that gather weights need.
    Collective: call on every rank.

    Returns:
        "validation_loss" and the objective's other figures, each with the prefix "validation_".
    """
    sums: dict[str, Tensor] = {}
    model.eval()
    for batch, weights_B in loader.held_out(num_samples):
        for name, values_B in objective.evaluate(model, objective.prepare(batch)).items():
            sums[name] = (
                sums.get(name, torch.zeros((), device=values_B.device)) + (values_B * weights_B).sum()
            )
        sums["weight"] = sums.get("weight", torch.zeros((), device=weights_B.device)) + weights_B.sum()
    model.train()
    totals = torch.stack(list(sums.values()))
    dist.all_reduce(totals)
    figures = dict(zip(sums, totals.tolist(), strict=True))
    weight = figures.pop("weight")
    return {f"validation_{name}": value / weight for name, value in figures.items()}
