"""Bytes on one GPU, by what they are for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kandinsky_dist.config.schema import ParallelConfig
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.estimate.survey import HOLDS_FP32_WEIGHTS, LOW, Survey
from kandinsky_dist.estimate.textbook import LOW_BYTES, bytes_per_parameter
from kandinsky_dist.parallel.ds_config import shipped_file

GIB = 2**30
HEADROOM = 0.1
"""Of a GPU's memory, left to the CUDA context, NCCL's buffers, cuDNN's workspaces and allocator's gaps."""
_MAX_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment.

    `activations`, `encoding` (the frozen encoders while they run) and `stepping` (fp32 copies of gradients in
    the step) are never there together: the largest counts.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    averages: float
    encoders: float
    buckets: float
    gathered: float
    activations: float
    encoding: float
    stepping: float

    @property
    def states(self) -> float:
        """All that lives from one step to the next."""
        return self.weights + self.gradients + self.masters + self.moments + self.averages + self.encoders

    @property
    def resident(self) -> float:
        """What does not depend on the micro-batch."""
        return self.states + self.buckets + self.gathered

    @property
    def total(self) -> float:
        """Everything at the fullest moment."""
        return self.resident + max(self.activations, self.encoding, self.stepping)

    def as_row(self) -> dict[str, float]:
        """Part -> bytes, for a record."""
        return {f"{name}_bytes": value for name, value in (asdict(self) | {"total": self.total}).items()}


def memory(
    survey: Survey,
    parallel: ParallelConfig,
    precision: str,
    *,
    num_ranks: int,
    micro_batch_size: int,
    num_micro: int,
    num_averages: int,
) -> Memory:
    """What one rank holds.

    Args:
        survey: of the networks.
        parallel: strategy and its settings; recomputation.
        precision: "fp32", "bf16" or "fp16".
        num_ranks: GPUs.
        micro_batch_size: samples a forward.
        num_micro: micro-batches a step; one alone is reduced at once and never accumulates.
        num_averages: decays of optim.ema_decay.
    """
    strategy, trained = parallel.strategy, survey.num_trained
    low = LOW_BYTES[precision]
    num_shards = (parallel.shard_size or num_ranks) if strategy == "fsdp2" else num_ranks
    held = bytes_per_parameter(strategy, precision, num_shards)
    frozen = survey.num_values - trained
    gradients = held.gradients
    if num_micro == 1 and strategy in ("fsdp2", "zero1"):
        gradients /= num_shards
    is_cast = strategy in HOLDS_FP32_WEIGHTS
    activations = survey.activations(is_cast, precision, parallel.gradient_checkpointing)
    buckets, gathered = _communicated(survey, parallel, low)
    settings = _zero_settings(parallel)
    is_offloaded = settings.get("offload_optimizer", {}).get("device", "none") != "none"
    is_copying = precision in LOW and strategy in ("zero1", "zero2", "zero3")
    return Memory(
        weights=held.weights * (trained + frozen),
        gradients=gradients * trained,
        masters=0.0 if is_offloaded else held.masters * trained,
        moments=0.0 if is_offloaded else held.moments * trained,
        averages=0.0 if is_offloaded else 4.0 * num_averages * trained / num_ranks,
        encoders=(low if precision in LOW else 4.0) * survey.encoder_values,
        buckets=buckets,
        gathered=gathered,
        activations=activations.num_bytes(micro_batch_size),
        encoding=survey.encoding_per_sample * micro_batch_size,
        stepping=4.0 * trained / num_ranks if is_copying and not is_offloaded else 0.0,
    )


def _communicated(survey: Survey, parallel: ParallelConfig, low: float) -> tuple[float, float]:
    """Bytes of communication buffers, and of weights that are gathered for a while."""
    strategy, bucket = parallel.strategy, parallel.bucket_mib * 2**20
    if strategy == "ddp":  # gradients are views of their buckets
        return (0.0 if parallel.gradient_compression == "none" else bucket / 2), 0.0
    if strategy == "fsdp2":
        *units, outside = survey.unit_values
        largest = max(units)
        ahead = sum(sorted(units)[-1 - parallel.prefetch_blocks :])
        gathered = outside + (ahead if parallel.reshard_after_forward else sum(units))
        return largest * (4.0 + low), gathered * low
    if strategy == "zero3":
        live = _zero_settings(parallel).get("stage3_max_live_parameters", _MAX_LIVE)
        return bucket, min(live, survey.num_values) * low
    if strategy in ("zero1", "zero2"):
        return bucket * (2 if parallel.overlap else 1), 0.0
    return 0.0, 0.0


def _zero_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed file in use; empty under other strategies."""
    if not parallel.strategy.startswith("zero"):
        return {}
    path = Path(parallel.ds_config) if parallel.ds_config else shipped_file(parallel.strategy)
    try:
        settings = json.loads(path.read_text("utf-8"))["zero_optimization"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(
            f"parallel.ds_config={path} is no JSON object with zero_optimization in it"
        ) from None
    return dict(settings)
