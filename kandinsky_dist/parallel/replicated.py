"""The guarded step of engines that leave it to us; what those share that hold every weight on every rank."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kandinsky_dist.optim.adamw import set_learning_rate
from kandinsky_dist.parallel.base import Fragment, StepOutcome
from kandinsky_dist.parallel.loss_scale import LossScale


def autocast_forward(module: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Runs the module's forward under autocast where `precision` is not fp32."""
    if precision != torch.float32:
        module.forward = torch.autocast(device.type, precision)(module.forward)


def guard_and_clip(
    optimizer: torch.optim.AdamW,
    gradients: Sequence[Tensor],
    *,
    learning_rate: float,
    max_grad_norm: float,
    shards: dist.ProcessGroup | None = None,
    loss_scale: LossScale | None = None,
) -> StepOutcome:
    """Has the fused optimizer clip reduced gradients and skip a step that is not finite. No host sync.

    The gradients are reduced, so a NaN of any rank is in every rank's norm and all ranks skip alike. The
    optimizer's own pass divides them: clipping costs no other.

    Args:
        optimizer: fused; its learning rate is set.
        gradients: what this rank holds of them.
        learning_rate: of the step.
        max_grad_norm: the global norm is clipped to this; 0 does not clip.
        shards: ranks that together hold all gradients; None where this rank does.
        loss_scale: of the losses that the gradients are of; they are divided by it, and it is updated.

    Returns:
        The outcome of the step that `optimizer.step()` will then take.
    """
    grad_norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if shards is not None:
        square = grad_norm.double().square()  # a square may leave fp32
        dist.all_reduce(square, group=shards)
        grad_norm = square.sqrt().float()
    divisor = torch.ones_like(grad_norm) if loss_scale is None else loss_scale.value.clone()
    grad_norm = grad_norm / divisor  # a power of two, so exact
    if max_grad_norm > 0:
        divisor = divisor * ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    skipped = (~torch.isfinite(grad_norm)).to(torch.float32)
    rescaled = torch.zeros_like(skipped) if loss_scale is None else loss_scale.update(skipped)
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    set_learning_rate(optimizer, learning_rate)
    return StepOutcome(grad_norm, skipped, rescaled)


def whole_fragments(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[Fragment]:
    """Every trained parameter as one fragment: what a rank holds."""
    found = []
    for name, parameter in named:
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
            found.append(Fragment(name, 0, parameter.numel(), *(tensor.view(-1) for tensor in tensors)))
    return found


def owned_share(held: Iterable[Fragment], *, rank: int, world_size: int) -> list[Fragment]:
    """This rank's 1/world_size of each whole fragment: what it writes."""
    found = []
    for fragment in held:
        start, stop = (fragment.numel * edge // world_size for edge in (rank, rank + 1))
        if stop > start:
            parts = (
                tensor[start:stop] for tensor in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq)
            )
            found.append(Fragment(fragment.name, start, fragment.numel, *parts))
    return found
