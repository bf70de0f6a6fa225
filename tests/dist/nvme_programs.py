"""ZeRO-3 whose weights lie elsewhere: what the ranks of the test of NVMe run."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.bench.workload import build, random_weights, workload
from kandinsky_dist.checkpoint.layout import CheckpointReader, RankTensors, write_tensors
from kandinsky_dist.config.schema import Config, DataConfig, ParallelConfig
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import ModelPlan
from kandinsky_dist.parallel.ds_config import import_deepspeed
from kandinsky_dist.parallel.select import select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import joined

LEARNING_RATE = 1e-3


def why_not() -> str | None:
    """Why DeepSpeed's reader and writer beside Python cannot be built here; None if it can."""
    try:
        return None if _reader().is_compatible() else "libaio's headers are missing (libaio-dev)"
    except Exception as error:
        return str(error)


def compile_reader() -> None:
    """Minutes the first time; ranks that came to it together would run out of patience."""
    _reader().load(verbose=False)


def _reader() -> Any:
    """DeepSpeed's builder of it."""
    return import_deepspeed("cpu").get_accelerator().create_op_builder("AsyncIOBuilder")


def write_and_read_back(file: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """Trains, saves, trains as far again, loads what was saved and repeats the second part."""
    folder.mkdir(parents=True, exist_ok=True)
    with joined() as process:
        config = Config(
            stage="prior",
            data=DataConfig(global_batch_size=process.world_size, micro_batch_size=1),
            parallel=ParallelConfig(strategy="zero3", precision="fp32", ds_config=file),
        )
        torch.manual_seed(0)
        structure = partial(build, "prior", "small")
        objective, prepared = workload("prior", "small", process)
        strategy = select(config, process, num_micro=1)
        optimizer = partial(build_adamw, config=config.optim)
        model = strategy.prepare(ModelPlan(structure, partial(random_weights, structure), optimizer))

        def train() -> list[float]:
            losses = []
            for _ in range(num_steps):
                with strategy.accumulate(is_last=True):
                    loss = objective.losses(model, prepared).mean()
                    strategy.backward(loss)
                strategy.step(learning_rate=LEARNING_RATE)
                losses.append(loss.item())
            return losses

        losses = train()
        saved = RankTensors.of(strategy.fragments())
        write_tensors(folder / f"rank_{process.rank:05d}.safetensors", saved)
        digests = _digests(saved)
        losses += train()
        agree.gather(None)  # all have written
        strategy.load_fragments(CheckpointReader(folder), num_steps=num_steps)
        loaded = _digests(RankTensors.of(strategy.fragments()))
        swappers = {getattr(item, "nvme_swapper", None) for item in model.parameters()} - {None}
        return {
            "losses": losses,
            "saved": digests,
            "loaded": loaded,
            "losses again": train(),
            "num_swapped": sum(len(item.id_to_path) for item in swappers),
        }


def _digests(held: RankTensors) -> dict[str, str]:
    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    return {name: digest(tensor) for name, tensor in held.tensors.items()}
