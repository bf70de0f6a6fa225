"""DeepSpeed ZeRO 0 to 3 behind the Strategy protocol."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.optim.adamw import ensure_state, set_learning_rate, set_step_count
from kandinsky_dist.parallel import ds_config, loss_scale
from kandinsky_dist.parallel.base import (
    Fragment,
    FragmentSource,
    ModelPlan,
    StepOutcome,
    Strategy,
    cast_inputs,
    load_initial,
)
from kandinsky_dist.parallel.replicated import autocast_forward, guard_and_clip, owned_share, whole_fragments
from kandinsky_dist.parallel.shares import gather_shares
from kandinsky_dist.runtime.process import Process

HYSTERESIS = "loss_scale_hysteresis"
"""Overflows that leave DeepSpeed's loss scale as it is, before the next one lowers it."""


class ZeroStrategy(Strategy):
    """A DeepSpeed engine around the model; the subclasses know where their stage keeps what a rank owns."""

    # Stages 1 to 3 keep weights in the precision of the engine and fp32 masters beside them; ZeRO-0 keeps
    # fp32 weights and autocasts, because DeepSpeed's own bf16 wrapper for stage 0 takes a step with zero
    # gradients to create its state, which sets AdamW's bias correction one step ahead.
    holds_low_precision_weights = True

    def __init__(self, config: Config, process: Process, *, num_micro: int, precision: torch.dtype) -> None:
        super().__init__(config, process, num_micro=num_micro, precision=precision)
        if self.holds_low_precision_weights and precision == torch.float16:
            self.loss_scale = None  # DeepSpeed has its own
            deepspeed = ds_config.import_deepspeed(process.device.type)
            if not deepspeed.get_accelerator().is_fp16_supported():
                raise ConfigError(
                    f"parallel.precision=fp16 is not supported by DeepSpeed on this {process.device.type}, "
                    f"which parallel.strategy={config.parallel.strategy} needs: use bf16, or ddp or fsdp2"
                )

    def prepare(self, plan: ModelPlan) -> nn.Module:
        """Builds the model and hands it to `deepspeed.initialize`."""
        deepspeed = ds_config.import_deepspeed(self.process.device.type)
        held = self.precision if self.holds_low_precision_weights else torch.float32
        self._settings = ds_config.complete(
            self.config, world_size=self.process.world_size, num_micro=self.num_micro, precision=held
        )
        deepspeed.init_distributed(dist_init_required=False)
        module = self._build(deepspeed, plan)
        if not self.holds_low_precision_weights:
            autocast_forward(module, self.process.device, self.precision)
        self._named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=plan.optimizer(self._named), config=self._settings
        )
        if held != torch.float32:
            cast_inputs(self._engine.module, held)
        if held == torch.float16:
            # At the least scale a step is skipped like any other, and the guard judges how often that may be.
            self._scaler.raise_error_at_min_scale = False
        ensure_state(self._adamw, self._masters())
        self.process.before_leaving(ds_config.release_groups)
        self.process.before_leaving(self._engine.destroy)  # its hooks on weights would keep it and its groups
        return self._engine

    def _build(self, deepspeed: Any, plan: ModelPlan) -> nn.Module:
        module = plan.build()
        load_initial(module, plan.state_dict())
        return module

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """The optimizer inside DeepSpeed's wrapper."""
        return self._engine.optimizer.optimizer

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's loss scaler; one that does nothing unless the precision is fp16."""
        return self._engine.optimizer.loss_scaler

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW updates on this rank."""
        raise NotImplementedError

    @contextmanager
    def accumulate(self, *, is_last: bool) -> Iterator[None]:
        """Tells the engine which micro-batch ends the step; it reduces accordingly."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """The engine's backward; `loss` is already divided by the number of micro-batches."""
        self._engine.backward(self.scaled(loss), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, *, learning_rate: float) -> StepOutcome:
        """The engine's own clip, skip and update."""
        set_learning_rate(self._engine.optimizer, learning_rate)
        is_least = self._scaler.cur_scale <= getattr(self._scaler, "min_scale", self._scaler.cur_scale)
        self._engine.step()
        is_skipped = bool(self._engine.optimizer.overflow)  # a host value: DeepSpeed has synchronised already
        grad_norm = float("inf") if is_skipped else self._engine.get_global_grad_norm()
        device = self.process.device
        return StepOutcome(
            grad_norm=torch.as_tensor(grad_norm, device=device).to(torch.float32),
            skipped=torch.tensor(float(is_skipped), device=device),
            rescaled=torch.tensor(float(is_skipped and not is_least), device=device),
        )

    def engine_state(self) -> dict[str, float]:
        """DeepSpeed's loss scale, under the names that all strategies use."""
        if not self.holds_low_precision_weights or not self._scaler.dynamic:
            return super().engine_state()
        scaler = self._scaler
        return {
            loss_scale.SCALE: float(scaler.cur_scale),
            loss_scale.NUM_GOOD_STEPS: scaler.cur_iter - scaler.last_overflow_iter - 1,
            HYSTERESIS: scaler.cur_hysteresis,
        }

    def load_engine_state(self, state: Mapping[str, float]) -> None:
        """Continues with a loss scale, or from the first one that the file asks for."""
        if not self.holds_low_precision_weights or not self._scaler.dynamic:
            return super().load_engine_state(state)
        initial = 2.0 ** self._settings["fp16"]["initial_scale_power"]
        self._scaler.cur_scale = state.get(loss_scale.SCALE, initial)
        self._scaler.cur_iter = int(state.get(loss_scale.NUM_GOOD_STEPS, 0))
        self._scaler.last_overflow_iter = -1
        self._scaler.cur_hysteresis = int(state.get(HYSTERESIS, self._scaler.delayed_shift))
        return None

    def load_fragments(self, source: FragmentSource, *, num_steps: int) -> None:
        """Fills this rank's masters and moments, then the weights of all ranks from them."""
        self.copy_from(source, self._held())
        set_step_count(self._adamw, num_steps)
        self.publish()

    def _held(self) -> Sequence[Fragment]:
        """All that is in this rank's memory; what it owns, unless the stage replicates."""
        return self.fragments()

    def _fragment(
        self, name: str, start: int, stop: int, numel: int, master: Tensor, offset: int
    ) -> Fragment:
        """A piece of a parameter that lies at `offset` of a flat master tensor."""
        state = self._adamw.state[master]
        tensors = (master.detach(), state["exp_avg"], state["exp_avg_sq"])
        return Fragment(name, start, numel, *(tensor.narrow(0, offset, stop - start) for tensor in tensors))


class Zero0(ZeroStrategy):
    """Replicated weights; DeepSpeed reduces, the code clips, guards and skips."""

    holds_low_precision_weights = False

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self._engine.optimizer

    def _masters(self) -> list[Tensor]:
        return [parameter for _, parameter in self._named]

    def step(self, *, learning_rate: float) -> StepOutcome:
        """Clip and guard on the device, then the engine's update."""
        gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        outcome = guard_and_clip(
            self._adamw,
            gradients,
            learning_rate=learning_rate,
            max_grad_norm=self.config.optim.max_grad_norm,
            loss_scale=self.loss_scale,
        )
        self._engine.step()
        return outcome

    def fragments(self) -> Sequence[Fragment]:
        """1/world_size of each parameter."""
        return owned_share(self._held(), rank=self.process.rank, world_size=self.process.world_size)

    def _held(self) -> Sequence[Fragment]:
        return whole_fragments(self._named, self._adamw)

    def publish(self) -> None:
        """Every rank's share of each parameter, to all."""
        gather_shares([item.detach().view(-1) for _, item in self._named])


class Zero12(ZeroStrategy):
    """Stages 1 and 2: each rank updates its partition of the flattened groups."""

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def fragments(self) -> Sequence[Fragment]:
        """The pieces of parameters that fall into this rank's partitions."""
        masters = self._masters()
        found = []
        for name, parameter in self._named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                master = masters[mapping.param_group_index]
                stop = inside.start + inside.numel
                found.append(self._fragment(name, inside.start, stop, parameter.numel(), master, flat.start))
        return found

    def publish(self) -> None:
        """Every partition in the precision of the engine, to all."""
        self._engine.optimizer.update_lp_params()


class Zero3(ZeroStrategy):
    """Stage 3: weights are partitioned too, from the moment the model is built."""

    gathers_weights = True

    def _build(self, deepspeed: Any, plan: ModelPlan) -> nn.Module:
        # No dtype argument: where fp16 is not supported DeepSpeed 0.19 reads any as bf16. The file says it.
        with deepspeed.zero.Init(config_dict_or_path=self._settings):
            module = plan.build()
        weights = plan.state_dict()
        for name, parameter in module.named_parameters():
            if name in weights:
                # One at a time: gathering all would put the whole model on every rank.
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.process.is_first:
                        parameter.data.copy_(weights[name])
        return module

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def fragments(self) -> Sequence[Fragment]:
        """This rank's equal slice of each parameter, without the padding at the end."""
        optimizer = self._engine.optimizer
        found = []
        for name, parameter in self._named:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * self.process.rank
            stop = min(start + size, parameter.ds_numel)  # type: ignore[attr-defined]
            if stop > start:
                master = optimizer.fp32_partitioned_groups_flat[group]
                numel = parameter.ds_numel  # type: ignore[attr-defined]
                found.append(self._fragment(name, start, stop, numel, master, offset))
        return found

    def publish(self) -> None:
        """Slices in the precision of the engine; small parameters, which every rank keeps whole, to all."""
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
