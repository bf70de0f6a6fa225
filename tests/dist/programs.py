"""What the ranks of these tests run."""

from pathlib import Path
from typing import Any

import torch

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.runtime.process import joined
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
