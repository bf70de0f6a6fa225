"""From `parallel.strategy` to the engine that serves it."""

import torch

from kandinsky_dist.config.schema import Config
from kandinsky_dist.parallel.base import Strategy
from kandinsky_dist.parallel.ddp import DDPStrategy
from kandinsky_dist.parallel.fsdp2 import FSDP2Strategy
from kandinsky_dist.parallel.zero import Zero0, Zero3, Zero12
from kandinsky_dist.runtime.process import Process

STRATEGIES: dict[str, type[Strategy]] = {
    "ddp": DDPStrategy,
    "fsdp2": FSDP2Strategy,
    "zero0": Zero0,
    "zero1": Zero12,
    "zero2": Zero12,
    "zero3": Zero3,
}


def engine_precision(config: Config, device: torch.device) -> torch.dtype:
    """The type that matrix products run in; `auto` is bf16 on a GPU and fp32 on a CPU."""
    name = config.parallel.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def select(config: Config, process: Process, *, num_micro: int) -> Strategy:
    """The strategy that the configuration names."""
    precision = engine_precision(config, process.device)
    return STRATEGIES[config.parallel.strategy](config, process, num_micro=num_micro, precision=precision)
