"""FSDP2: weights, gradients and moments cut by rows, block by block; HSDP: a copy for each group of ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from kandinsky_dist.models.blocks import blocks
from kandinsky_dist.optim.adamw import ensure_state, set_step_count
from kandinsky_dist.parallel.base import (
    Fragment,
    FragmentSource,
    ModelPlan,
    StepOutcome,
    Strategy,
    load_initial,
)
from kandinsky_dist.parallel.replicated import guard_and_clip
from kandinsky_dist.parallel.shares import gather_shares


class FSDP2Strategy(Strategy):
    """torch's `fully_shard`: every parameter is cut by rows over the ranks that share a copy of the weights.

    Weights, moments and reductions are fp32; in bf16 the gathered weights and the activations are bf16.
    """

    gathers_weights = True

    def prepare(self, plan: ModelPlan) -> nn.Module:
        """Builds the model on the host and moves it to the device block by block, each rank its rows."""
        module = plan.build()
        load_initial(module, plan.state_dict())
        self._mesh = _mesh(self.process.device.type, self.process.world_size, self.config.parallel.shard_size)
        is_low = self.precision != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.precision if is_low else None, reduce_dtype=torch.float32 if is_low else None
        )
        units = blocks(module)
        for unit in [*units, module]:
            fully_shard(
                unit,
                mesh=self._mesh,
                mp_policy=policy,
                # The root's weights are the first that backward needs: letting go of them would save nothing.
                reshard_after_forward=self.config.parallel.reshard_after_forward and unit is not module,
            )
        _prefetch(units, self.config.parallel.prefetch_blocks)
        assert isinstance(module, FSDPModule)
        self._module = module
        self._named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
        self._optimizer = plan.optimizer(self._named)
        ensure_state(self._optimizer, (item for _, item in self._named))
        # DTensor's cache of sharding decisions holds the mesh and its groups.
        self.process.before_leaving(_clear_sharding_prop_cache)
        return module

    @contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        """Gradients stay whole and local until the last micro-batch, whose backward reduces them."""
        self._module.set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Plain backward; each block's gradients are reduce-scattered when they are complete."""
        self.scaled(loss).backward()

    def step(self, *, learning_rate: float) -> StepOutcome:
        """Clip, guard and fused AdamW on this rank's rows, all on the device."""
        gradients = [_local(item.grad) for _, item in self._named if item.grad is not None]
        outcome = guard_and_clip(
            self._optimizer,
            gradients,
            learning_rate=learning_rate,
            max_grad_norm=self.config.optim.max_grad_norm,
            loss_scale=self.loss_scale,
            shards=self._mesh.get_group("shard"),
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return outcome

    def fragments(self) -> Sequence[Fragment]:
        """This rank's rows of each parameter; with copies, an equal part of them."""
        copy, num_copies = self._mesh.get_local_rank("copy"), self._mesh["copy"].size()
        found = []
        for whole in self._held():
            size = whole.master.numel()
            begin, end = (size * edge // num_copies for edge in (copy, copy + 1))
            if end > begin:
                parts = (tensor[begin:end] for tensor in (whole.master, whole.exp_avg, whole.exp_avg_sq))
                found.append(Fragment(whole.name, whole.start + begin, whole.numel, *parts))
        return found

    def load_fragments(self, source: FragmentSource, *, num_steps: int) -> None:
        """Every rank reads the rows that it holds."""
        self.copy_from(source, self._held())
        set_step_count(self._optimizer, num_steps)
        self.publish()

    def publish(self) -> None:
        """Shards to all copies of them. What is gathered is let go, for it is of the weights before."""
        gather_shares([item.master for item in self._held()], self._mesh.get_group("copy"))
        for unit in self._module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    def _held(self) -> list[Fragment]:
        """All rows in this rank's memory."""
        shard, num_shards = self._mesh.get_local_rank("shard"), self._mesh["shard"].size()
        found = []
        for name, parameter in self._named:
            state = self._optimizer.state[parameter]
            tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
            master, exp_avg, exp_avg_sq = (_local(tensor).view(-1) for tensor in tensors)
            if master.numel():
                rows = -(-parameter.shape[0] // num_shards)  # as torch.chunk cuts: the last ones may be short
                start = shard * rows * (parameter.numel() // parameter.shape[0])
                found.append(Fragment(name, start, parameter.numel(), master, exp_avg, exp_avg_sq))
        return found


def _mesh(device_type: str, world_size: int, shard_size: int) -> DeviceMesh:
    """Ranks as copies x shards; neighbours, which are on one node, share a copy."""
    shard_size = shard_size or world_size
    return init_device_mesh(
        device_type, (world_size // shard_size, shard_size), mesh_dim_names=("copy", "shard")
    )


def _prefetch(units: Sequence[nn.Module], depth: int) -> None:
    """Gathers the weights of so many blocks ahead, in forward and in backward."""
    for order, setter in (
        (list(units), FSDPModule.set_modules_to_forward_prefetch),
        (list(reversed(units)), FSDPModule.set_modules_to_backward_prefetch),
    ):
        for index, unit in enumerate(order):
            assert isinstance(unit, FSDPModule)
            setter(unit, order[index + 1 : index + 1 + depth])  # type: ignore[arg-type]


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
