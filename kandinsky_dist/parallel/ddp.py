"""DistributedDataParallel: replicated weights, gradients all-reduced in buckets beside backward."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kandinsky_dist.optim.adamw import ensure_state, set_step_count
from kandinsky_dist.parallel.base import (
    Fragment,
    FragmentSource,
    ModelPlan,
    StepOutcome,
    Strategy,
    load_initial,
)
from kandinsky_dist.parallel.ddp_reduction import COMPRESSED, bucket_arguments, reduce_compressed
from kandinsky_dist.parallel.replicated import autocast_forward, guard_and_clip, owned_share, whole_fragments
from kandinsky_dist.parallel.shares import gather_shares

_SYNC = "forward_sync_buffers"  # torch 2.13; before it was broadcast_buffers
_HAS_SYNC = _SYNC in inspect.signature(DistributedDataParallel).parameters
CONSTANT_BUFFERS: dict[str, Any] = {_SYNC if _HAS_SYNC else "broadcast_buffers": False}
"""Forward would wait for rank 0's buffers, which are constants."""


class DDPStrategy(Strategy):
    """torch's DDP; alone it is the plain module, so the reference and the engine are one code path."""

    def prepare(self, plan: ModelPlan) -> nn.Module:
        """Builds the model on the device and wraps it."""
        module = plan.build()
        load_initial(module, plan.state_dict())
        module.to(self.process.device)
        autocast_forward(module, self.process.device, self.precision)
        self._named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
        self._optimizer = plan.optimizer(self._named)
        ensure_state(self._optimizer, (item for _, item in self._named))
        self._ddp = None
        if self.process.world_size > 1:
            self._ddp = DistributedDataParallel(
                module,
                device_ids=[self.process.device.index] if self.process.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=self.config.parallel.static_graph,
                **CONSTANT_BUFFERS,
                **bucket_arguments(self.config.parallel),
            )
            self.process.before_leaving(self._release_group)
            if self.config.parallel.gradient_compression != "none":
                dtype = COMPRESSED[self.config.parallel.gradient_compression]
                self._ddp.register_comm_hook(dtype, reduce_compressed)
        self._must_learn_graph = self.config.parallel.static_graph
        return self._ddp or module

    def _release_group(self) -> None:
        """Drop DDP's references to the group; there is no backward after it."""
        for name in ("reducer", "logger", "process_group"):
            setattr(self._ddp, name, None)

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients stay local until the last micro-batch."""
        # A static graph is learnt in the first backward, which must not be without reduction. It does no
        # harm: the mean over ranks of what is already their mean is that mean.
        is_reduced = is_last or self._must_learn_graph
        self._must_learn_graph = False
        return nullcontext() if is_reduced or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Plain backward; DDP's hooks reduce the buckets as they fill."""
        self.scaled(loss).backward()

    def step(self, *, learning_rate: float) -> StepOutcome:
        """Clip, guard and fused AdamW, all on the device."""
        gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        outcome = guard_and_clip(
            self._optimizer,
            gradients,
            learning_rate=learning_rate,
            max_grad_norm=self.config.optim.max_grad_norm,
            loss_scale=self.loss_scale,
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return outcome

    def fragments(self) -> Sequence[Fragment]:
        """1/world_size of each parameter."""
        held = whole_fragments(self._named, self._optimizer)
        return owned_share(held, rank=self.process.rank, world_size=self.process.world_size)

    def load_fragments(self, source: FragmentSource, *, num_steps: int) -> None:
        """Every rank reads everything: it holds everything."""
        self.copy_from(source, whole_fragments(self._named, self._optimizer))
        set_step_count(self._optimizer, num_steps)

    def publish(self) -> None:
        """Every rank's share of each parameter, to all."""
        gather_shares([item.detach().view(-1) for _, item in self._named])
