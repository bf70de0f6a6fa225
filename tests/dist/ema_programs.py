"""What the ranks of the tests of averages run."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kandinsky_dist.checkpoint.layout import RankTensors, write_tensors
from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.parallel.base import StepOutcome
from kandinsky_dist.parallel.shares import gather_shares
from kandinsky_dist.runtime.process import Process, joined
from kandinsky_dist.train.average import with_average
from kandinsky_dist.train.trainer import Trainer


def recorded(stage: str, settings: dict[str, Any], bad_step: int, out: Path) -> None:
    """Trains with averages, and validates them once more; writes down the weights after every step.

    OUT/start and OUT/after_STEP hold rank_*.safetensors, OUT/facts_RANK.json the rest. The settings are used
    for a first run without averages and validation too, in OUT/plain.

    Args:
        bad_step: the last rank's gradients are NaN in this step.
    """
    with joined() as process:
        plain = {"optim.ema_decay": (), "validation.every_steps": 0, "run.dir": str(out / "plain")}
        without = _trainer(stage, settings | plain, process)
        _spoil(without, bad_step)
        without.run()
        trainer = _trainer(stage, settings, process)
        _spoil(trainer, bad_step)
        _record(trainer, "start", out)
        take_step, skipped = trainer.strategy.step, []

        def step(*, learning_rate: float) -> StepOutcome:
            outcome = take_step(learning_rate=learning_rate)
            skipped.append(outcome.skipped.item())
            _record(trainer, f"after_{trainer.state.step + 1}", out)
            return outcome

        trainer.strategy.step = step  # type: ignore[method-assign]
        trainer.run()
        figures = [trainer.evaluate()]
        before = _held(trainer)
        figures.append(with_average(trainer.ema, trainer.strategy, trainer.evaluate))
        figures.append(trainer.evaluate())
        after = _held(trainer)
        facts = {
            "skipped": skipped,
            "figures": figures,
            "num_compared": sum(tensor.numel() for tensor in before),
            "is_untouched": all(_same_bits(*pair) for pair in zip(before, after, strict=True)),
        }
        (out / f"facts_{process.rank}.json").write_text(json.dumps(facts))


def evaluated(stage: str, settings: dict[str, Any], out: Path) -> None:
    """Writes the held-out figures of the weights that the settings name, before any training."""
    with joined() as process:
        trainer = _trainer(stage, settings, process)
        out.write_text(json.dumps(trainer.evaluate()))
        trainer.feed.close()


def gather(lengths: list[int], buckets_bytes: list[int]) -> int:
    """Exit code 0 where tensors of which each rank knows its share are known to all, at every bucket size."""
    with joined() as process:
        rank, world_size = process.rank, process.world_size
        for bucket_bytes in buckets_bytes:
            expected = [torch.arange(float(length)) + 1000 * number for number, length in enumerate(lengths)]
            wholes = [torch.full_like(whole, math.nan) for whole in expected]
            for whole, right in zip(wholes, expected, strict=True):
                begin, end = (len(right) * edge // world_size for edge in (rank, rank + 1))
                whole[begin:end] = right[begin:end]
            gather_shares(wholes, bucket_bytes=bucket_bytes)
            if not all(map(torch.equal, wholes, expected)):
                return 1
        dist.barrier()
    return 0


def _trainer(stage: str, settings: dict[str, Any], process: Process) -> Trainer:
    return Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())


def _spoil(trainer: Trainer, bad_step: int) -> None:
    backward, process = trainer.strategy.backward, trainer.process

    def spoilt(loss: Tensor) -> None:
        is_bad = trainer.state.step + 1 == bad_step and process.rank == process.world_size - 1
        backward(loss * math.nan if is_bad else loss)

    trainer.strategy.backward = spoilt  # type: ignore[method-assign]


def _record(trainer: Trainer, name: str, out: Path) -> None:
    (out / name).mkdir(parents=True, exist_ok=True)
    file = out / name / f"rank_{trainer.process.rank:05d}.safetensors"
    write_tensors(file, RankTensors.of(trainer.strategy.fragments(), trainer.ema.tensors()))


def _held(trainer: Trainer) -> list[Tensor]:
    """Copies of all weights in this rank's memory, of its masters and of its averages."""
    found = [fragment.master for fragment in trainer.strategy.fragments()]
    found += [tensor for held in trainer.ema.tensors().values() for tensor in held]
    for parameter in trainer.model.parameters():
        tensor = parameter.detach()
        found.append(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        if hasattr(parameter, "ds_tensor"):  # what ZeRO-3 gathers
            found.append(parameter.ds_tensor)
    return [tensor.detach().clone() for tensor in found]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
