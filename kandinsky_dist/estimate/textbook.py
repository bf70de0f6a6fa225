"""What ZeRO's paper promises: bytes of model states a rank, by parameter.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv 1910.02054), section 3.1 and figure 1. With N ranks and Psi parameters, mixed precision and Adam:
replicated (2 + 2 + 12) Psi; stage 1 divides the 12 (fp32 master copy 4, moments 8) by N, stage 2 the
gradients too, stage 3 all.
"""

from dataclasses import dataclass

LOW_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
"""By value of what the network computes with."""
_MASTER_BYTES = 4.0
_MOMENTS_BYTES = 8.0


@dataclass(frozen=True)
class States:
    """Bytes by class; a class that a strategy does not hold is 0."""

    weights: float
    gradients: float
    masters: float
    moments: float

    @property
    def total(self) -> float:
        """All model states."""
        return self.weights + self.gradients + self.masters + self.moments


def bytes_per_parameter(strategy: str, precision: str, world_size: int) -> States:
    """Model states of one rank by parameter.

    In fp32 the same derivation with 4 for 2, under two conditions of what is measured here: DeepSpeed keeps
    a master copy beside fp32 weights too (stages 1 to 3), and the other strategies keep none. Under bf16
    these hold fp32 weights and gradients, and autocast or gather in bf16: 4 + 4 + 8 where the paper has
    2 + 2 + 4 + 8. fsdp2 cuts weights and moments, and gradients when they are reduced, after accumulation.

    Args:
        strategy: as parallel.strategy.
        precision: "bf16", "fp16" or "fp32".
        world_size: N.
    """
    if strategy in ("ddp", "fsdp2", "zero0"):
        num_shards = world_size if strategy == "fsdp2" else 1
        return States(
            weights=4.0 / num_shards, gradients=4.0, masters=0.0, moments=_MOMENTS_BYTES / num_shards
        )
    low, stage = LOW_BYTES[precision], int(strategy.removeprefix("zero"))
    return States(
        weights=low / (world_size if stage >= 3 else 1),
        gradients=low / (world_size if stage >= 2 else 1),
        masters=_MASTER_BYTES / world_size,
        moments=_MOMENTS_BYTES / world_size,
    )
