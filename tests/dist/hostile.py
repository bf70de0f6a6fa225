"""Runs whose data turns hostile on a stretch of positions: what the ranks of the guard's tests run."""

import contextlib
import hashlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kandinsky_dist.checkpoint import manager
from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.cli import main
from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.parallel.base import FRAGMENT_KINDS
from kandinsky_dist.parallel.ds_config import import_deepspeed
from kandinsky_dist.runtime.process import Process, joined
from kandinsky_dist.train import rollback
from kandinsky_dist.train.feed import Feed
from kandinsky_dist.train.trainer import Trainer


class DiedError(Exception):
    """A process that ends where it stands."""


@dataclass(frozen=True)
class Run:
    """One start of the trainer.

    Attributes:
        settings: of the configuration.
        factors: position of a sample -> what its loss is multiplied with.
        moved_to: position from which the data is taken in place of the one that belongs to the step.
        observed_step: the step before and after which weights, moments and step counts are looked at.
        dies_at: the moment at which the process ends, see `_dying`.
    """

    settings: Mapping[str, Any]
    factors: Mapping[int, float] = field(default_factory=dict)
    moved_to: int | None = None
    observed_step: int | None = None
    dies_at: str | None = None


class Hostile:
    """An objective that multiplies the losses of some positions."""

    def __init__(self, objective: Any, factors: Mapping[int, float]) -> None:
        self._objective = objective
        self._factors = factors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def losses(self, model: Any, prepared: Any, **arguments: Any) -> torch.Tensor:
        losses_B = self._objective.losses(model, prepared, **arguments)
        factors = [self._factors.get(position, 1.0) for position in prepared.positions_B.tolist()]
        return losses_B * torch.tensor(factors)


def all_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs one after another on this process and those beside it."""
    with joined() as process:
        return [one_run(run, process) for run in runs]


def all_runs_in_fp16(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The same where DeepSpeed would refuse fp16: on a CPU, whose torch can do what it takes."""
    accelerator = import_deepspeed("cpu").get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    return all_runs(runs)


def command_where_fp16_is_refused(arguments: list[str]) -> int:
    """Run the command line where DeepSpeed takes no fp16: it takes it on CPUs with AVX512-FP16 alone."""
    accelerator = import_deepspeed("cpu").get_accelerator()
    accelerator.is_fp16_supported = lambda: False
    return main(arguments)


def one_run(run: Run, process: Process) -> dict[str, Any]:
    """Trains to the end; returns how it ended and what `observed_step` did to this rank's fragments."""
    resolved = loader.load("prior", None, [loader.Layer("test", dict(run.settings))])
    found: dict[str, Any] = {"error": None, "changed": None}
    with _dying(run.dies_at):
        try:
            trainer = Trainer(resolved, process, StopRequest())
            trainer.objective = Hostile(trainer.objective, run.factors)
            if run.moved_to is not None:
                trainer.state.samples_consumed = run.moved_to
                steps = trainer.loader.steps(run.moved_to)
                trainer.feed = Feed(steps, trainer.objective.prepare, StopRequest(), process.device)
            _observe(trainer, run.observed_step, found)
            trainer.run()
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
    return found


def _observe(trainer: Trainer, observed_step: int | None, found: dict[str, Any]) -> None:
    take_step = trainer.strategy.step

    def everything() -> list[torch.Tensor]:
        counts = [state["step"] for state in trainer.strategy_optimizer().state.values() if "step" in state]
        fragments = [getattr(item, kind) for item in trainer.strategy.fragments() for kind in FRAGMENT_KINDS]
        # Under ZeRO-3 this rank's part: whether the whole is in memory too differs from step to step.
        weights = [getattr(item, "ds_tensor", item) for item in trainer.model.parameters()]
        return [tensor.detach().clone() for tensor in (*counts, *fragments, *weights)]

    def step(**arguments: Any) -> Any:
        if trainer.state.step + 1 != observed_step:
            return take_step(**arguments)
        before = everything()
        outcome = take_step(**arguments)
        pairs = zip(before, everything(), strict=True)
        found["changed"] = sum(not torch.equal(*pair) for pair in pairs)
        return outcome

    strategy = trainer.strategy
    trainer.strategy_optimizer = lambda: getattr(strategy, "_adamw", None) or strategy._optimizer
    trainer.strategy.step = step


@contextlib.contextmanager
def _dying(moment: str | None) -> Any:
    """Lets the process end just before the rollback is a fact, just behind, in the removal, or after it.

    "killed ..." are real: SIGKILL to the first rank. At the others everything is dropped where it stands.
    """
    name, _, when = (moment or "").rpartition(" ")
    places: dict[str, tuple[Any, str]] = {
        "commit": (rollback, "write_rollback"),
        "log": (rollback, "write_whole"),
        "removal": (manager, "remove"),
        "loading": (rollback.CheckpointReader, "read"),
    }
    if name.removeprefix("killed ") not in places:
        yield
        return
    owner, attribute = places[name.removeprefix("killed ")]
    real = getattr(owner, attribute)

    def end(*arguments: Any, **others: Any) -> Any:
        if attribute == "remove" and not manager.read_rollback(arguments[0].parent):
            return real(*arguments, **others)  # retention, not the rollback
        if attribute == "read" and not manager.read_rollback(arguments[0].folder.parent):
            return real(*arguments, **others)
        if when == "after":
            real(*arguments, **others)
        if name.startswith("killed "):
            os.kill(os.getpid(), signal.SIGKILL)
        raise DiedError(moment)

    setattr(owner, attribute, end)
    try:
        yield
    finally:
        setattr(owner, attribute, real)


def content(checkpoint: Path) -> dict[str, str]:
    """Every saved value of a checkpoint, digested, by name and kind."""
    reader = CheckpointReader(checkpoint)
    return {
        f"{name}/{kind}": hashlib.sha256(reader.read(name, kind, 0, numel).numpy().tobytes()).hexdigest()
        for name, numel in reader.numels.items()
        for kind in FRAGMENT_KINDS
    }
