"""Fused AdamW, its parameter groups, and optimizer state that exists before the first step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import OptimConfig

# Weights without a gradient that still sit in a decayed tensor would only shrink: conv_out also predicts
# a variance that no loss here reads.
_NEVER_DECAYED = ("clip_mean", "clip_std", "conv_out.", "positional_embedding", "prd_embedding")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and kernels only.

    Args:
        name: the parameter's name in the model.
        parameter: the parameter; under ZeRO-3 its full shape is in `ds_shape`.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not name.startswith(_NEVER_DECAYED)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Trainable parameters as at most two AdamW groups, decayed first.

    Without decay there is one group, so that engines which flatten groups flatten all at once.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if weight_decay == 0.0:
        return [{"params": [parameter for _, parameter in trained], "weight_decay": 0.0}]
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in trained:
        split[is_decayed(name, parameter)].append(parameter)
    groups = [
        {"params": split[True], "weight_decay": weight_decay},
        {"params": split[False], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, with learning rate 0 until a step sets one."""
    return torch.optim.AdamW(
        parameter_groups(named, config.weight_decay),
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def ensure_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Creates the state that AdamW would create at its first step, where it is missing.

    A checkpoint can then be loaded into it, and memory runs out at the start or not at all.
    """
    for parameter in parameters:
        state = optimizer.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def set_step_count(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Makes bias correction continue after `num_steps` optimizer steps."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(num_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the next step's learning rate. No host sync."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
