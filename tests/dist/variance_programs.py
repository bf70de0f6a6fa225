"""A U-Net that is trained for a while, without encoders or data: what the ranks of a test run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from kandinsky_dist.bench.workload import build, workload
from kandinsky_dist.checkpoint.layout import RankTensors, write_tensors
from kandinsky_dist.config.schema import Config, DataConfig, OptimConfig, ParallelConfig
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import ModelPlan
from kandinsky_dist.parallel.select import select
from kandinsky_dist.runtime.process import joined


def train_unet(strategies: Sequence[str], weights: dict[str, Tensor], num_steps: int, out: Path) -> None:
    """Leaves this rank's fragments in OUT/STRATEGY."""
    with joined() as process:
        for strategy_name in strategies:
            config = Config(
                stage="decoder",
                data=DataConfig(global_batch_size=process.world_size, micro_batch_size=1),
                optim=OptimConfig(weight_decay=0.1),
                parallel=ParallelConfig(strategy=strategy_name, precision="fp32"),  # type: ignore[arg-type]
            )
            objective, prepared = workload("decoder", "tiny", process)
            strategy = select(config, process, num_micro=1)
            structure, optimizer = (
                partial(build, "decoder", "tiny"),
                partial(build_adamw, config=config.optim),
            )
            model = strategy.prepare(ModelPlan(structure, lambda: weights, optimizer))
            for _ in range(num_steps):
                with strategy.accumulate(is_last=True):
                    strategy.backward(objective.losses(model, prepared).mean())
                strategy.step(learning_rate=1e-3)
            folder = out / strategy_name
            folder.mkdir(exist_ok=True)
            held = RankTensors.of(strategy.fragments())
            write_tensors(folder / f"rank_{process.rank:05d}.safetensors", held)
