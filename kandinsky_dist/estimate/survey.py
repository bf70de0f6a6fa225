"""What a network is made of, and what a micro-batch of it keeps: counted once, on shapes alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_dist.config.schema import Config
from kandinsky_dist.estimate.networks import Networks
from kandinsky_dist.estimate.trace import Trace, trace, transient_bytes
from kandinsky_dist.models.architectures import MAX_TOKENS
from kandinsky_dist.models.blocks import blocks
from kandinsky_dist.objectives.base import Objective, Prepared
from kandinsky_dist.parallel.base import cast_inputs
from kandinsky_dist.telemetry.flops import Products

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
HOLDS_FP32_WEIGHTS = ("ddp", "zero0")
"""Strategies that autocast over fp32 weights; the others compute with weights in the low precision."""


@dataclass(frozen=True)
class Activations:
    """Bytes over the states, of a micro-batch of b samples: fixed + per_sample x b.

    Under autocast the fixed part holds the low-precision copies of the weights.
    """

    fixed: float
    per_sample: float

    def num_bytes(self, micro_batch_size: int) -> float:
        """At the fullest moment of forward and backward."""
        return self.fixed + self.per_sample * micro_batch_size

    def largest(self, room: float) -> int:
        """Samples that fit into so many bytes."""
        return max(0, int((room - self.fixed) // self.per_sample))


class Survey:
    """The networks of a configuration, counted on tensors without memory.

    Args:
        config: the run's; strategy, precision and recomputation are asked for one by one.
        num_text_tokens: of a caption.

    Attributes:
        num_values, num_trained: values of the trained network, and of it those that are trained.
        unit_values: trained values of each block, then of what is outside of the blocks.
        encoder_values: values of the frozen networks that run in training; 0 where none does.
        flops, encoder_flops: of one sample's forward.
    """

    def __init__(self, config: Config, num_text_tokens: int = MAX_TOKENS) -> None:
        self.networks = Networks.of(config)
        self.num_text_tokens = num_text_tokens
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            model = self.networks.build()
            self.num_values = _count(model.parameters())
            self.num_trained = _count(item for item in model.parameters() if item.requires_grad)
            units = [
                _count(item for item in unit.parameters() if item.requires_grad) for unit in blocks(model)
            ]
            self.unit_values = (*units, self.num_trained - sum(units))
            self.encoder_values = sum(
                _count(item.parameters())
                for item in vars(self._objective).values()
                if isinstance(item, nn.Module) and self.networks.is_encoding
            )
            with torch.no_grad(), Products() as products:
                self._prepared(1)
            encoder_flops = products.flops
            self.encoder_flops = encoder_flops if self.networks.is_encoding else 0.0
            prepared = self._prepared(1)
            with torch.no_grad(), Products() as products:
                self._losses(model, prepared)
            self.flops = products.flops
        self._model, self.activations = cache(self._build), cache(self._activations)

    @cached_property
    def _objective(self) -> Objective:
        """Encoders in bf16, as on any GPU that trains in less than fp32."""
        with self._mode:
            return self.networks.build_objective(torch.bfloat16)

    def _prepared(self, num_samples: int) -> Prepared:
        return self._objective.prepare(self.networks.batch(num_samples, self.num_text_tokens))

    def _losses(self, model: nn.Module, prepared: Prepared) -> Tensor:
        return self._objective.losses(model, prepared)

    def trace(self, strategy: str, precision: str, *, is_recomputed: bool, num_samples: int) -> Trace:
        """Forward and backward of one micro-batch."""
        low = LOW.get(precision)
        is_cast = low is not None and strategy in HOLDS_FP32_WEIGHTS
        with self._mode:
            model = self._model(None if is_cast else low, is_recomputed)
            prepared = self._prepared(num_samples)
            return trace(
                model, lambda model: self._losses(model, prepared), autocast=low if is_cast else None
            )

    def _build(self, low: torch.dtype | None, is_recomputed: bool) -> nn.Module:
        """The network with fp32 weights, or with all in a low precision."""
        model = self.networks.with_recomputation(is_recomputed).build(low or torch.float32)
        if low is not None:
            cast_inputs(model, low)
        return model

    def _activations(self, is_cast: bool, precision: str, is_recomputed: bool) -> Activations:
        """The line through the configuration's micro-batch, where it is exact, and a smaller one.

        The truth is the largest of several lines, so that beyond the two it lies on or above this one.
        """
        strategy = HOLDS_FP32_WEIGHTS[0] if is_cast else ""
        size = max(2, self.networks.config.data.micro_batch_size)
        sizes = (size // 2, size)
        first, last = (
            self.trace(strategy, precision, is_recomputed=is_recomputed, num_samples=number).peak
            for number in sizes
        )
        slope = (last - first) / (sizes[1] - sizes[0])
        return Activations(first - slope * sizes[0], slope)

    @cached_property
    def encoding_per_sample(self) -> float:
        """Bytes that the encoders take while they run."""
        if not self.networks.is_encoding:
            return 0.0
        with self._mode:
            batch = self.networks.batch(2, self.num_text_tokens)
            return ceil(transient_bytes(lambda: self._objective.prepare(batch)) / 2)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(item.numel() for item in parameters)
