"""The protocol between the trainer and an engine, and the fragments in which an engine's state is seen.

A fragment is a flat, contiguous slice of one named parameter that this rank owns, in fp32, with its two
moments. Checkpoints, and whatever else must not depend on the engine, are written over fragments once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kandinsky_dist.config.schema import Config
from kandinsky_dist.parallel.loss_scale import LossScale
from kandinsky_dist.runtime.process import Process

FRAGMENT_KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Values [start, start + len) of a flattened parameter; the tensors are live, not copies.

    `numel` is the size of the whole parameter. `master`, `exp_avg`, `exp_avg_sq` are 1-D fp32.
    """

    name: str
    start: int
    numel: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stop(self) -> int:
        """End of the range, exclusive."""
        return self.start + self.master.numel()


class FragmentSource(Protocol):
    """Where saved fragments come from: any range of any parameter, whoever wrote it."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened parameter, 1-D fp32 on the CPU."""


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did, on the device: reading it is a host sync and waits for the log cadence.

    `rescaled` is 1 where the step was skipped and the loss scale of fp16 lowered: with a smaller one the
    gradients may be finite. All three are 0-d fp32.
    """

    grad_norm: Tensor
    skipped: Tensor
    rescaled: Tensor


@dataclass(frozen=True)
class ModelPlan:
    """How to make the trained model and its optimizer; the strategy decides where and when.

    Attributes:
        build: makes the module's structure in fp32, trainable flags set, weights arbitrary.
        state_dict: initial weights by name, on the CPU; a parameter without one keeps what `build` gave it.
        optimizer: makes AdamW from named parameters.
    """

    build: Callable[[], nn.Module]
    state_dict: Callable[[], Mapping[str, Tensor]]
    optimizer: Callable[[Sequence[tuple[str, nn.Parameter]]], torch.optim.AdamW]


class Strategy(ABC):
    """One engine.

    Call order: `prepare` once; then for each step `num_micro` times `accumulate` around forward and
    `backward`, and once `step`.
    """

    gathers_weights = False
    """Whether forward waits for other ranks, because weights are spread over them."""

    def __init__(self, config: Config, process: Process, *, num_micro: int, precision: torch.dtype) -> None:
        self.config = config
        self.process = process
        self.num_micro = num_micro
        self.precision = precision
        self.loss_scale = LossScale(process.device) if precision == torch.float16 else None

    @abstractmethod
    def prepare(self, plan: ModelPlan) -> nn.Module:
        """Builds the model and optimizer; returns what the objective calls. Collective."""

    @abstractmethod
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds one micro-batch's forward and backward; gradients are reduced in the last one only."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradients. `loss` is already divided by `num_micro`."""

    @abstractmethod
    def step(self, *, learning_rate: float) -> StepOutcome:
        """Clips, updates, and clears gradients. A non-finite step changes nothing. Collective."""

    @abstractmethod
    def fragments(self) -> Sequence[Fragment]:
        """What this rank owns; over all ranks every trained value exactly once, in a stable order."""

    @abstractmethod
    def load_fragments(self, source: FragmentSource, *, num_steps: int) -> None:
        """Restores weights, moments and the optimizer's step count. Collective."""

    @abstractmethod
    def publish(self) -> None:
        """Brings the weights that forward reads, on every rank, up to the owned masters. Collective.

        For masters that were changed in place between two steps.
        """

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as backward takes it: multiplied with the loss scale of fp16."""
        return loss * self.loss_scale.value if self.loss_scale else loss

    def engine_state(self) -> dict[str, float]:
        """What the next steps depend on beside the fragments: the loss scale of fp16. Host sync."""
        return self.loss_scale.state() if self.loss_scale else {}

    def load_engine_state(self, state: Mapping[str, float]) -> None:
        """Continues from what some engine's `engine_state` was; from the beginning where it is empty."""
        if self.loss_scale:
            self.loss_scale.load(state)

    def copy_from(self, source: FragmentSource, held: Sequence[Fragment]) -> None:
        """Fills live fragments from a source."""
        for fragment in held:
            for kind in FRAGMENT_KINDS:
                values = source.read(fragment.name, kind, fragment.start, fragment.stop)
                getattr(fragment, kind).copy_(values)


def load_initial(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies initial weights into a whole module; adapters, which have none, keep theirs."""
    unexpected = module.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, f"weights without a parameter: {unexpected[:3]}"


def cast_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes `module` cast its floating-point inputs to `dtype`: callers work in fp32, weights may not."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        return value

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)
