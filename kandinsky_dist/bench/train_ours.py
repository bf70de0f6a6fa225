"""A case of `bench train` that is this trainer itself: its own loop, made to take turns between steps."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.bench.parts import Parts, replace_method
from kandinsky_dist.bench.switches import turn_off
from kandinsky_dist.bench.teams import OverError, Turns
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.objectives.base import Objective
from kandinsky_dist.parallel.select import engine_precision
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train import build
from kandinsky_dist.train.trainer import Trainer


def run(case: Case, turns: Turns, folder: Path) -> None:
    """Trains whenever it is this case's turn. For `Team`."""
    for lever in case.without:
        turn_off(lever)
    with joined() as process:
        parts = Parts(process.device)
        build_objective = build.build_objective

        def build_watched(*args: Any, **kwargs: Any) -> Objective:
            objective = build_objective(*args, **kwargs)
            parts.time_calls(objective, "prepare", "encoders")
            parts.time_calls(objective, "losses", "forward")
            return objective

        # Before the trainer is made: its parts keep methods of the objective.
        setattr(build, build_objective.__name__, build_watched)
        trainer = Trainer(case.resolved({"run.dir": str(folder / "run")}), process, StopRequest())
        _observe(trainer, parts, turns)
        precision = str(engine_precision(trainer.config, process.device)).removeprefix("torch.")
        turns.ready(
            synchronized_clock(process.device),
            precision=precision,
            threads_per_rank=torch.get_num_threads(),
        )
        with contextlib.suppress(OverError):
            trainer.run()


def synchronized_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, once the device has finished."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _observe(trainer: Trainer, parts: Parts, turns: Turns) -> None:
    """Puts clocks around the other parts of a step, and the turns between two steps."""
    parts.time_calls(trainer.strategy, "backward", "backward")
    _without_communication(trainer, turns)
    parts.time_calls(trainer.strategy, "step", "optimizer")
    parts.time_calls(trainer.ema, "update", "average")
    next_step_data, add_loss = trainer.next_step_data, trainer.losses.add
    waited_before = 0.0

    def begin() -> None:
        nonlocal waited_before
        parts.read()
        trainer.meter.report(0.0)  # its figures are to be those of the turn
        waited_before = trainer.loader.data_wait_seconds

    def end(_step_seconds: float) -> dict[str, Any]:
        waited = trainer.loader.data_wait_seconds - waited_before
        figures: dict[str, Any] = trainer.meter.report(waited)
        if "tflops_per_second" in figures:  # of one rank; samples are of all
            tflop = figures["tflops_per_second"] / figures["samples_per_second"]
            figures["gflop_per_sample"] = 1e3 * tflop * trainer.process.world_size
        return {**figures, "parts": parts.read() | {"data": waited}}

    def take_turn_then_data() -> Any:
        turns.step_begins()
        return next_step_data()

    def keep_first_loss(loss: Tensor, *rest: Any) -> None:
        if turns.first_loss is None:
            turns.first_loss = loss
        add_loss(loss, *rest)

    turns.on_begin, turns.on_end, turns.pause = begin, end, trainer.meter.pause
    replace_method(trainer, "next_step_data", take_turn_then_data)
    replace_method(trainer.losses, "add", keep_first_loss)


def _without_communication(trainer: Trainer, turns: Turns) -> None:
    """Lets a turn leave gradients unreduced, as if every micro-batch were followed by another.

    Ranks then have different gradients: at learning rate 0 they keep the same weights.
    """
    strategy = trainer.strategy
    accumulate, step = strategy.accumulate, strategy.step

    def accumulate_as_told(*, is_last: bool) -> Any:
        return accumulate(is_last=is_last and turns.kind != "silent")

    def step_as_told(*, learning_rate: float, **rest: Any) -> Any:
        return step(learning_rate=learning_rate if turns.kind == "train" else 0.0, **rest)

    replace_method(strategy, "accumulate", accumulate_as_told)
    replace_method(strategy, "step", step_as_told)
