"""What the ranks of these tests run."""

import json
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_dist.checkpoint.layout import CheckpointReader, RankTensors, write_tensors
from kandinsky_dist.config import loader
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.parallel.base import StepOutcome
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train.step import train_step
from kandinsky_dist.train.trainer import Trainer


def frozen_facts(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a trainer holds of its frozen encoders, and what its optimizer holds, after its run."""
    with joined() as process:
        trainer = Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())
        trainer.run()
        held = vars(trainer.objective).items()
        encoders = {name: module for name, module in held if isinstance(module, torch.nn.Module)}
        frozen = [parameter for module in encoders.values() for parameter in module.parameters()]
        states = trainer.strategy._adamw.state.values()
        return {
            "shapes": {
                encoder: {name: list(parameter.shape) for name, parameter in module.named_parameters()}
                for encoder, module in encoders.items()
            },
            "dtypes": sorted({str(parameter.dtype) for parameter in frozen}),
            "are_partitioned": any(hasattr(parameter, "ds_id") for parameter in frozen),
            "require_grad": any(parameter.requires_grad for parameter in frozen),
            "num_trained": sum(fragment.master.numel() for fragment in trainer.strategy.fragments()),
            "num_optimized": sum(state["exp_avg"].numel() for state in states if "exp_avg" in state),
            "trained_are_partitioned": all(hasattr(item, "ds_id") for item in trainer.model.parameters()),
        }


def saved_names(folder: Path) -> set[str]:
    """Parameters that a checkpoint holds."""
    return set(CheckpointReader(folder).numels)


def go_on_from(
    stage: str, settings: dict[str, Any], checkpoints: dict[str, Path], num_steps: int, out: Path
) -> None:
    """Loads one checkpoint after another into one trainer; leaves what it then holds, and its next losses.

    OUT/NAME/rank_*.safetensors are the fragments after loading, OUT/NAME/losses.json the global losses.
    """
    with joined() as process:
        trainer = Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())
        for name, folder in checkpoints.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            reader = CheckpointReader(folder)
            trainer.strategy.load_fragments(reader, num_steps=reader.state.run.num_updates)
            trainer.state = reader.state.run
            held = RankTensors.of(trainer.strategy.fragments())
            write_tensors(out / name / f"rank_{process.rank:05d}.safetensors", held)
            steps, losses = trainer.loader.steps(trainer.state.samples_consumed), []
            for _ in range(num_steps):
                loss, _outcome = train_step(
                    trainer.strategy,
                    trainer.objective,
                    trainer.model,
                    [trainer.objective.prepare(batch) for batch in next(steps)],
                    learning_rate=trainer.learning_rate(),
                )
                trainer.state.advance(trainer.config.data.global_batch_size)
                torch.distributed.all_reduce(loss)
                losses.append(loss.item() / process.world_size)
            steps.close()
            if process.is_first:
                (out / name / "losses.json").write_text(json.dumps(losses))
        trainer.feed.close()


class ScalarReads(TorchDispatchMode):
    """Counts where a tensor's value is read by the host: on a GPU each of these waits for the device."""

    OPERATORS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.readers: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in self.OPERATORS:
            # Whose code it is: the innermost frame outside torch.
            frames = [
                frame for frame in reversed(traceback.extract_stack()) if "/torch/" not in frame.filename
            ]
            frame = next(frame for frame in frames if not frame.filename.endswith("programs.py"))
            self.readers[f"{frame.filename}:{frame.lineno}"] += 1
        return operator(*args, **(kwargs or {}))


def read_by_the_host(stage: str, settings: dict[str, Any], num_steps: int, out: Path) -> None:
    """OUT/rank_N.json: who reads how many values in some steps of the loop, log entries and saves aside."""
    with joined() as process:
        trainer = Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())
        steps = trainer.loader.steps(0)

        def train(microbatches: list[Batch], learning_rate: float) -> tuple[torch.Tensor, StepOutcome]:
            prepared = [trainer.objective.prepare(batch) for batch in microbatches]
            return train_step(
                trainer.strategy, trainer.objective, trainer.model, prepared, learning_rate=learning_rate
            )

        train(next(steps), learning_rate=1e-3)  # the first one may set things up
        batches = [next(steps) for _ in range(num_steps)]
        is_cuda = process.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        with ScalarReads() as reads:
            for microbatches in batches:
                loss, outcome = train(microbatches, learning_rate=trainer.learning_rate())
                trainer.state.advance(trainer.config.data.global_batch_size)
                trainer.losses.add(loss, outcome)
                trainer.meter.tick(trainer.cost(microbatches) if trainer.cost else None)
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        steps.close()
        trainer.feed.close()
        (out / f"rank_{process.rank}.json").write_text(json.dumps(reads.readers))


def train_each(stage: str, cases: list[dict[str, Any]]) -> None:
    """Trains one run after another in the same processes; what they leave is in their run folders."""
    with joined() as process:
        for settings in cases:
            resolved = loader.load(stage, None, [loader.Layer("test", settings)])
            Trainer(resolved, process, StopRequest()).run()
