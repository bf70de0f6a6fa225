"""What the ranks of the checkpoint tests run."""

import contextlib
import io
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky_dist.checkpoint import snapshot
from kandinsky_dist.checkpoint.layout import RunState, folder_name
from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.config import loader
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.parallel.base import Strategy
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import Process, joined
from kandinsky_dist.train.trainer import Trainer


def background_facts(stage: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saves of one trained state, beside training and not, and what came of it on this rank."""
    with joined() as process:
        trainer = Trainer(loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest())
        trainer.run()
        facts: dict[str, Any] = {"same": [], "threads_after_run": threads()}
        stop = StopRequest()
        in_step = manager(folder / "in_step", process, is_async=False)
        beside = manager(folder / "beside", process, is_async=True, on_failure=stop.make)
        state = RunState(7, 56, [0.5, 0.25], 3)
        for number in range(3):  # the second and third into memory that holds the one before
            facts["same"].append(same_files(trainer.strategy, state, in_step, beside, folder))
            state = RunState(8 + number, 64 + number, [0.125], 4)
        facts["short of memory"] = saves_without_memory(trainer.strategy, folder, process)
        facts["answers"] = answers_while_writing(trainer.strategy, state, beside, process)
        facts["failures"] = failures(trainer.strategy, beside, stop, process)
        agree.gather(None)  # rank 0 tidies up after all know of the failure
        facts["left"] = sorted(path.name for path in (folder / "beside" / "checkpoints").iterdir())
        beside.save(trainer.strategy, RunState(99, 0, [], 0))  # after failures it goes on
        beside.finish()
        facts["threads"] = threads()
        return facts


def manager(
    folder: Path, process: Process, *, is_async: bool, on_failure: Callable[[], None] = lambda: None
) -> CheckpointManager:
    return CheckpointManager(
        folder,
        process,
        keep=9,
        identity={"run.seed": 1},
        config_yaml="stage: prior\n",
        is_async=is_async,
        on_failure=on_failure,
    )


def same_files(
    strategy: Strategy,
    state: RunState,
    in_step: CheckpointManager,
    beside: CheckpointManager,
    folder: Path,
) -> bool:
    """Whether both write the same bytes although all of it changes right after `save` has returned."""
    name = folder_name(state.step)
    held = strategy.fragments()
    extra = {"ema": [fragment.master * 0.5 for fragment in held]}
    in_step.save(strategy, state, extra)
    beside.save(strategy, state, extra)
    for index, fragment in enumerate(held):
        fragment.master.add_(1.0 + index)
        fragment.exp_avg.fill_(float("nan"))
        fragment.exp_avg_sq.mul_(-3.0)
        extra["ema"][index].zero_()
    state.advance(8)
    state.pending_losses.append(1.0)
    state.num_bad_samples += 1
    beside.finish()
    for fragment in held:
        fragment.exp_avg.copy_(torch.linspace(0, 1, fragment.exp_avg.numel()))  # NaNs would hide the next
    written, expected = (
        {path.name: path.read_bytes() for path in (folder / place / "checkpoints" / name).iterdir()}
        for place in ("beside", "in_step")
    )
    return len(written) == 5 and written == expected  # two ranks, state, configuration, COMMIT


def saves_without_memory(strategy: Strategy, folder: Path, process: Process) -> dict[str, Any]:
    """What a save does where rank 1's machine has no memory for copies, and once it has some."""
    short = manager(folder / "short", process, is_async=True)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(snapshot, "free_bytes", lambda: 2**10 if process.rank == 1 else 2**40)
        short.save(strategy, RunState(7, 56, [], 3))
        finished = (folder / "short" / "checkpoints" / "step_00000007" / "COMMIT").exists()
        patch.undo()
        short.save(strategy, RunState(8, 64, [], 3))
    short.finish()
    return {"said": said.getvalue(), "is finished": finished}


def answers_while_writing(
    strategy: Strategy, state: RunState, beside: CheckpointManager, process: Process
) -> list[bool]:
    """Questions of the main threads while others agree on a checkpoint: whether each answer is its own."""
    beside.save(strategy, state)
    found, number = [], 0
    is_writing = True
    while is_writing:
        answers = agree.gather((number, process.rank, beside.is_writing))
        found.append([answer[:2] for answer in answers] == [(number, rank) for rank in range(len(answers))])
        is_writing = any(answer[2] for answer in answers)
        number += 1
    beside.finish()
    return found


def failures(
    strategy: Strategy, beside: CheckpointManager, stop: StopRequest, process: Process
) -> dict[str, str]:
    """What is raised where on this rank, when only rank 1 cannot write."""
    found = {}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if process.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # as a quota does
    try:
        beside.save(strategy, RunState(20, 160, [], 0))
        found["at the end"] = raised(beside.finish)
        found["once"] = raised(beside.finish)
        found["stop is made"] = str(stop.is_made)
        beside.save(strategy, RunState(21, 168, [], 0))
        found["at the next save"] = raised(lambda: beside.save(strategy, RunState(22, 176, [], 0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    device = "meta" if process.rank == 1 else "cpu"  # has no values to be copied
    extra = {"ema": [torch.zeros_like(fragment.master, device=device) for fragment in strategy.fragments()]}
    beside.save(strategy, RunState(23, 184, [], 0), extra)
    found["copy"] = raised(beside.finish)
    return found


def raised(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def threads() -> list[str]:
    """Threads of the checkpoints that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"]
