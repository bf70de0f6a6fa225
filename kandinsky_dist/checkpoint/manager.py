"""Saving and restoring a run, on all ranks alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kandinsky_dist.checkpoint.background import Background
from kandinsky_dist.checkpoint.foreign.kinds import CONVERTIBLE, saved_by
from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    TEMPORARY,
    CheckpointReader,
    RankTensors,
    RunState,
    checkpoints_of,
    damage,
    step_of,
)
from kandinsky_dist.checkpoint.rollback import Rollback, read_rollback
from kandinsky_dist.checkpoint.snapshot import Staging
from kandinsky_dist.checkpoint.writer import Writer, remove
from kandinsky_dist.errors import CheckpointError, ConfigError, KandinskyError
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.parallel.base import ModelPlan, Strategy
from kandinsky_dist.parallel.initial import InitialWeights
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a folder, what was passed over with the reason, and what is damaged."""

    folder: Path | None
    passed_over: tuple[str, ...]
    damaged: tuple[Path, ...] = ()


def newest_whole(folder: Path, *, at_most_step: int | None = None) -> Found:
    """Looks from the newest checkpoint down until one is whole. What a rollback has made void is left out.

    Args:
        folder: of the checkpoints.
        at_most_step: later ones are left out too.

    Raises:
        CheckpointError: none is whole although one had been finished: starting anew would hide the loss.
    """
    unfinished = sorted(folder.glob(f"step_*{TEMPORARY}"), reverse=True)
    passed_over = [f"{path}: its writing was cut off" for path in unfinished]
    damaged: list[Path] = []
    was_finished = False
    rollback = read_rollback(folder)
    for path in checkpoints_of(folder):
        is_later = at_most_step is not None and step_of(path) > at_most_step
        if is_later or (rollback is not None and rollback.voids(path)):
            continue
        reason = damage(path)
        if reason is None:
            return Found(path, tuple(passed_over), tuple(damaged))
        passed_over.append(f"{path}: {reason}")
        damaged.append(path)
        was_finished |= (path / COMMIT).exists()
    if was_finished:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({passed_over[0]}): restore one, or start anew in another "
            "run.dir"
        )
    return Found(None, tuple(passed_over))


class CheckpointManager:
    """Checkpoints of one run.

    Args:
        run_dir: the run's folder; checkpoints lie in its `checkpoints`.
        keep: how many whole checkpoints stay, at least 2.
        identity: configuration key -> value or fingerprint that a resumed run must share.
        config_yaml: the resolved configuration.
        fence: this start's claim to the run folder; None makes one that nobody has taken.
        is_async: `save` returns when its tensors are copied, and they are written beside training; where
            there is no memory for a copy, it waits and says so.
        on_failure: called as soon as what is written beside training has failed, from another thread.
    """

    def __init__(
        self,
        run_dir: Path,
        process: Process,
        *,
        keep: int,
        identity: Mapping[str, Any],
        config_yaml: str,
        is_async: bool,
        fence: Fence | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._process = process
        self.identity = identity
        self._writer = Writer(
            self.folder,
            process,
            keep=keep,
            identity=identity,
            config_yaml=config_yaml,
            fence=fence or Fence(run_dir),
        )
        self._staging = Staging() if is_async else None
        self._background = Background(on_failure)
        self.save_seconds = 0.0
        """Longest that a checkpoint took, from the first copy to its last file."""

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written beside training."""
        return self._background.is_busy

    def save(
        self, strategy: Strategy, state: RunState, extra: Mapping[str, Sequence[Tensor]] | None = None
    ) -> None:
        """Saves this step, after the save before it is done. Collective: call on every rank.

        The caller may change tensors and state at once. Where the manager is asynchronous, `finish` tells
        whether the checkpoint was written.

        Args:
            strategy: whose fragments are saved.
            state: where the run stands.
            extra: further kind -> one tensor for each of the strategy's fragments.

        Raises:
            CheckpointError: a rank could not write this one or the one before (named); the older checkpoints
                are untouched.
        """
        self.finish()
        start = time.monotonic()
        live = RankTensors.of(strategy.fragments(), extra)
        if self._staging is None or self._is_short_of_memory(live, self._staging):
            self._write(lambda: live, state, start)
        else:
            tensors = _copied(live, self._staging)
            self._background.start(partial(self._write, tensors, deepcopy(state), start))

    def _is_short_of_memory(self, live: RankTensors, staging: Staging) -> bool:
        lack = staging.lack_of_room(live)
        if lack is not None:
            say(f"a checkpoint's copy takes {lack}: training waits while it is written", self._process)
        return lack is not None

    def _write(self, tensors: Callable[[], RankTensors], state: RunState, start: float) -> None:
        self._writer.write(tensors, state)
        self.save_seconds = max(self.save_seconds, time.monotonic() - start)

    def finish(self) -> None:
        """Waits for what is being written. Collective: call on every rank.

        Raises:
            CheckpointError: it could not be written.
        """
        error = self._background.wait()
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for what is being written, on the way out of a run that has its own reason to end."""
        error = self._background.wait()
        if isinstance(error, KandinskyError):  # else a rank was lost, and that is what the run ends for
            say(str(error), self._process)

    def find(self, resume: str, allow_change: tuple[str, ...]) -> CheckpointReader | None:
        """The checkpoint that `run.resume` asks for, or None where there is nothing to resume.

        Another run's is what this run begins with: the same command again continues with its own.

        Reads only: what it refuses is refused before anything is written or built. Collective: call on every
        rank.

        Raises:
            CheckpointError: `resume` names no whole checkpoint.
            ConfigError: the checkpoint is of a run with another identity.
        """
        chosen, own = agree.decided_by_first(lambda: (self._choose(resume), read_rollback(self.folder)))
        for line in chosen.passed_over:
            say(f"passed over {line}", self._process)
        self._writer.give_up(chosen.damaged)
        if chosen.folder is None:
            if own is not None:  # back to the initial weights, at a position of the same data
                self._check_identity(self.folder, own.identity, allow_change)
            return None
        reader = CheckpointReader(chosen.folder)
        self._check_identity(chosen.folder, reader.state.identity, allow_change)
        return reader

    def restore(self, strategy: Strategy, reader: CheckpointReader | None, plan: ModelPlan) -> RunState:
        """Loads what `find` has found, or the plan's initial weights. Collective: call on every rank.

        What a rollback of this run has made void is removed.

        Returns:
            Where the run continues; a fresh state where there is nothing to resume.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        own = agree.decided_by_first(self._without_void)
        if reader is None:
            if own is None:
                return RunState()
            strategy.load_fragments(InitialWeights(plan), num_steps=0)
            strategy.load_engine_state({})
            return own.continued(RunState())
        for fragment in strategy.fragments():  # a larger parameter would be read in part
            found = reader.numels.get(fragment.name)
            if found not in (None, fragment.numel):
                raise CheckpointError(
                    f"{reader.folder} has {found} values of {fragment.name}, the model {fragment.numel}: "
                    "it is a checkpoint of another model"
                )
        state = reader.state.run
        strategy.load_fragments(reader, num_steps=state.num_updates)
        strategy.load_engine_state(state.engine)
        if reader.folder.parent.resolve() != self.folder.resolve():
            state.began_at_step = state.step
            theirs = agree.decided_by_first(lambda: read_rollback(reader.folder.parent))
            state = theirs.continued(state) if theirs else state
            if own is not None:  # else what is saved from now on would be void
                state.num_rollbacks = max(state.num_rollbacks, own.number)
        elif own is not None:
            state = own.continued(state)
        say(f"resumed {reader.folder} at sample {state.samples_consumed:,}", self._process)
        return state

    def _choose(self, resume: str) -> Found:
        if resume == "auto":
            return newest_whole(self.folder)
        if resume == "never":
            if checkpoints_of(self.folder) or read_rollback(self.folder):
                raise ConfigError(
                    f"run.resume=never, but {self.folder} holds checkpoints of an earlier run: "
                    "choose another run.dir, or run.resume=auto to continue it"
                )
            return Found(None, ())
        path = Path(resume)
        own = newest_whole(self.folder)
        if own.folder is not None:
            if not _is_inside(path, self.folder.parent):
                line = f"run.resume={path}: the run has begun and goes on with its own checkpoints"
                return replace(own, passed_over=(*own.passed_over, line))
            if (path / COMMIT).exists() and path.resolve() != own.folder.resolve():
                raise ConfigError(
                    f"run.resume={path} is not the newest of its run, {own.folder} is: begin with it in "
                    "another run.dir, or remove what came after it"
                )
            return own
        if (path / COMMIT).exists():
            reason = damage(path)
            if reason:
                raise CheckpointError(f"run.resume={path} is not a whole checkpoint: {reason}")
            return Found(path, ())
        found = newest_whole(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if found.folder is None:
            origin = saved_by(path)
            if origin in CONVERTIBLE:
                raise CheckpointError(
                    f"run.resume={path} is {origin.value}: make one of ours of it with kandinsky-dist "
                    f"checkpoint convert {path} OUT"
                )
            raise CheckpointError(f"run.resume={path}: no whole checkpoint there")
        return found

    def _check_identity(self, folder: Path, saved: Mapping[str, Any], allow_change: tuple[str, ...]) -> None:
        for key, value in self.identity.items():
            if key in saved and saved[key] != value and key not in allow_change:
                remedy = "use another run.dir"
                if "." in key:  # the stage is no setting, and nothing of one fits into the other
                    remedy += f", or allow it with --run.allow_change {key}"
                raise ConfigError(f"{key} is {value}, but {folder} was trained with {saved[key]}: {remedy}")

    def _without_void(self) -> Rollback | None:
        """Removes what the run's last rollback has made void, and returns that rollback. Rank 0 only."""
        rollback = read_rollback(self.folder)
        if rollback is not None:
            for path in filter(rollback.voids, checkpoints_of(self.folder)):
                try:
                    remove(path)
                except OSError as error:
                    raise CheckpointError(f"{path} holds diverged weights: {error.strerror}") from error
        return rollback


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _copied(live: RankTensors, staging: Staging) -> Callable[[], RankTensors]:
    """Copies now. What is returned waits for the copies, or raises here what all ranks must hear of."""
    try:
        taken = staging.take(live)
    except Exception as error:  # no memory for them
        failure = error

        def failed() -> RankTensors:
            raise failure

        return failed

    def copied() -> RankTensors:
        staging.wait()
        return taken

    return copied
