"""The parts of a run inside the test's own process, and a model that remembers what it was given."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers.command import train_arguments
from torch import Tensor, nn
from torch.nn import functional

from kandinsky_dist.config.loader import command_line_layer, load
from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.train import build, corpora

CPU = torch.device("cpu")


def configuration(stage: str, *settings: str, models: Path, corpus: Path) -> Config:
    """What `helpers.command.train` would run with."""
    arguments = train_arguments(
        stage, *settings, models=models, corpus=corpus, run_dir=Path("unused"), strategy="ddp"
    )
    return load(stage, None, [command_line_layer(arguments[2:])]).config


def objective_of(config: Config, precision: torch.dtype = torch.float32) -> Objective:
    """The stage's objective with its frozen networks."""
    return build.build_objective(config, build.Folders.of(config), CPU, precision)


def loader_of(config: Config, *, rank: int = 0, world_size: int = 1) -> Loader:
    """One rank's training data."""
    process = Process(rank=rank, local_rank=rank, world_size=world_size, device=CPU)
    order = corpora.training_order(config)
    return corpora.build_loader(config, build.Folders.of(config).prior, order, process, is_training=True)


def batch_at(loader: Loader, positions: Sequence[int]) -> Batch:
    """The samples at some positions of a loader's stream."""
    (batch,) = loader.source.batches([positions], 0)
    return batch


def padded(batch: Batch, length: int) -> Batch:
    """The same with its texts at a length."""
    assert batch.token_ids_BL is not None
    assert batch.token_mask_BL is not None
    missing = (0, length - batch.text_length)
    return replace(
        batch,
        token_ids_BL=functional.pad(batch.token_ids_BL, missing, value=49407),
        token_mask_BL=functional.pad(batch.token_mask_BL, missing, value=False),
    )


class Recorder(nn.Module):
    """Answers 0 and keeps its inputs: noised sample, timesteps and conditions of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[SimpleNamespace] = []

    def forward(
        self, sample: Tensor | None = None, hidden_states: Tensor | None = None, **inputs: Any
    ) -> SimpleNamespace:
        noised = hidden_states if sample is None else sample
        self.calls.append(
            SimpleNamespace(noised=noised, timesteps_B=inputs.pop("timestep"), conditions=inputs)
        )
        zeros = torch.zeros_like(noised)
        return SimpleNamespace(sample=torch.cat([zeros, zeros], 1), predicted_image_embedding=zeros)
