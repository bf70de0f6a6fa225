"""What the ranks of the conversion tests run."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.objective import padded
from torch import Tensor

from kandinsky_dist.checkpoint.layout import RankTensors, write_tensors
from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train.step import train_step
from kandinsky_dist.train.trainer import Trainer


@contextmanager
def made(stage: str, settings: dict[str, Any]) -> Iterator[Trainer]:
    """A trainer on this rank, which is not run."""
    with joined() as process:
        trainer = Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())
        yield trainer
        trainer.feed.close()


def train_and_save_with_deepspeed(settings: dict[str, Any], out: Path, at_step: int) -> None:
    """Trains to the end; the engine saves itself to OUT/global_stepN beside our checkpoint of that step."""
    with made("prior", settings) as trainer:
        save = trainer.save

        def save_twice() -> None:
            save()
            if trainer.state.step == at_step:
                engine = trainer.strategy._engine
                engine.save_checkpoint(str(out), tag=f"global_step{at_step}", client_state={"note": "ours"})

        trainer.save = save_twice
        trainer.run()


def to_universal(folder: Path, out: Path) -> None:
    """`python -m deepspeed.checkpoint.ds_to_universal`, in this process."""
    from kandinsky_dist.parallel.ds_config import import_deepspeed

    import_deepspeed("cpu")
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def load_with_deepspeed(settings: dict[str, Any], universal: Path, num_steps: int, out: Path) -> None:
    """Lets the engine itself load a universal checkpoint; leaves what it then holds, and its next losses.

    OUT/rank_*.safetensors are the fragments after loading, OUT/found.json all else.
    """
    with made("prior", settings) as trainer:
        strategy, process = trainer.strategy, trainer.process
        engine = strategy._engine
        # DeepSpeed's own schedule, as a program with one would have it.
        from deepspeed.runtime.lr_schedules import WarmupLR

        engine.lr_scheduler = WarmupLR(engine.optimizer, warmup_num_steps=100)
        path, client = engine.load_checkpoint(str(universal))
        schedule = engine.lr_scheduler.state_dict()
        engine.lr_scheduler = None
        write_tensors(out / f"rank_{process.rank:05d}.safetensors", RankTensors.of(strategy.fragments()))
        found = {
            "path": path,
            "schedule": schedule,
            "steps": engine.global_steps,
            "samples": engine.global_samples,
            "updates": sorted({float(item["step"]) for item in strategy._adamw.state.values()}),
            "is_published": is_published(engine),
            "client": sorted(client),
        }
        for item in strategy._adamw.state.values():
            item["step"] = item["step"].clone()  # see `write_universal`
        trainer.state.step, trainer.state.samples_consumed = engine.global_steps, engine.global_samples
        found["losses"] = next_losses(trainer, num_steps)
        if process.is_first:
            (out / "found.json").write_text(json.dumps(found))


def is_published(engine: Any) -> bool:
    """Whether the weights that forward reads are the masters."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    same = True
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                same &= torch.equal(parameter.detach().float().view(-1), master.view(-1))
    return same


def next_losses(trainer: Trainer, num_steps: int) -> list[float]:
    """Global losses of the next steps."""
    steps, losses = trainer.loader.steps(trainer.state.samples_consumed), []
    for _ in range(num_steps):
        rate = trainer.learning_rate()
        prepared = [trainer.objective.prepare(batch) for batch in next(steps)]
        loss, _outcome = train_step(
            trainer.strategy, trainer.objective, trainer.model, prepared, learning_rate=rate
        )
        trainer.state.advance(trainer.config.data.global_batch_size)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / trainer.process.world_size)
    steps.close()
    return losses


def go_on_beside_a_script(
    stage: str, settings: dict[str, Any], folder: Path, num_steps: int, out: Path
) -> None:
    """A trainer that resumed a converted folder, beside the script's network and AdamW on the same batches.

    OUT/differences.json: of each parameter, how far the two are apart after the last step, over how far
    theirs has gone.
    """
    from diffusers import PriorTransformer, UNet2DConditionModel

    component, cls = ("prior", PriorTransformer) if stage == "prior" else ("unet", UNet2DConditionModel)
    with made(stage, settings) as trainer:
        theirs = cls.from_pretrained(folder, subfolder=component).train()
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
        optimizer.load_state_dict(torch.load(folder / "optimizer.bin", weights_only=True))
        for group in optimizer.param_groups:
            group["weight_decay"] = trainer.config.optim.weight_decay
        start = {name: item.detach().clone() for name, item in theirs.named_parameters()}
        steps = trainer.loader.steps(trainer.state.samples_consumed)
        for _ in range(num_steps):
            microbatches = next(steps)
            rate = trainer.learning_rate()
            prepared = [trainer.objective.prepare(batch) for batch in microbatches]
            for batch in microbatches:
                # Their forward takes 77 tokens, no fewer, and computes the padding.
                whole = trainer.objective.prepare(batch if stage == "decoder" else padded(batch, 77))
                losses_B = trainer.objective.losses(theirs, replace(whole, num_text_tokens=None))
                (losses_B.mean() / len(microbatches)).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), trainer.config.optim.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            train_step(trainer.strategy, trainer.objective, trainer.model, prepared, learning_rate=rate)
            trainer.state.advance(trainer.config.data.global_batch_size)
        steps.close()
        ours = dict(trainer.strategy._named)
        found = {
            name: difference(ours[name].detach(), item.detach(), start[name])
            for name, item in theirs.named_parameters()
            if name in ours
        }
        (out / "differences.json").write_text(json.dumps(found))


def difference(ours: Tensor, theirs: Tensor, start: Tensor) -> float:
    return float((ours - theirs).norm() / (theirs - start).norm())
