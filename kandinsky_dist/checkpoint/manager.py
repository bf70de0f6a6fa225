"""Saving and restoring a run: atomic, checked, agreed on all ranks."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    CONFIG,
    STATE,
    CheckpointReader,
    RunState,
    SavedState,
    checksum,
    damage,
    folder_name,
    write_fragments,
    write_state,
)
from kandinsky_dist.checkpoint.rollback import Rollback, read_rollback
from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.parallel.base import ModelPlan, Strategy
from kandinsky_dist.parallel.initial import InitialWeights
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.disk import sync, write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process

_VERSIONED = ("kandinsky-dist", "torch", "diffusers", "transformers", "deepspeed")


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a folder, and the ones that were passed over with the reason."""

    folder: Path | None
    passed_over: tuple[str, ...]


def checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, whole or not."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_whole(folder: Path, *, at_most_step: int | None = None) -> Found:
    """Looks from the newest checkpoint down until one is whole. What a rollback has made void is left out.

    Args:
        folder: of the checkpoints.
        at_most_step: later ones are left out too.

    Raises:
        CheckpointError: none is whole although one had been finished: starting anew would hide the loss.
    """
    passed_over: list[str] = []
    was_finished = False
    rollback = read_rollback(folder)
    for path in checkpoints_of(folder):
        is_later = at_most_step is not None and int(path.name[5:]) > at_most_step
        if is_later or (rollback is not None and rollback.voids(path)):
            continue
        reason = damage(path)
        if reason is None:
            return Found(path, tuple(passed_over))
        passed_over.append(f"{path}: {reason}")
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
    """

    def __init__(
        self, run_dir: Path, process: Process, *, keep: int, identity: Mapping[str, Any], config_yaml: str
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._process = process
        self._keep = keep
        self.identity = identity
        self._config_yaml = config_yaml

    def save(self, strategy: Strategy, state: RunState) -> Path:
        """Writes a checkpoint of this step. Collective: call on every rank.

        Raises:
            CheckpointError: a rank could not write (named); the run's older checkpoints are untouched.
        """
        final = self.folder / folder_name(state.step)
        temporary = final.with_name(final.name + ".tmp")
        is_first = self._process.is_first
        self._attempt(lambda: _fresh(temporary) if is_first else None)
        name = f"rank_{self._process.rank:05d}.safetensors"

        def write() -> dict[str, Any]:
            write_fragments(temporary / name, strategy.fragments())
            return checksum(temporary / name)

        try:
            mine = self._attempt(write)
            files = dict(agree.gather((name, mine)))
            self._attempt(lambda: self._finish(temporary, final, files, state) if is_first else None)
        except CheckpointError:
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                if not (final / COMMIT).exists():  # renamed, but no room for the last file
                    shutil.rmtree(final, ignore_errors=True)
            raise
        return final

    def find(self, resume: str, allow_change: tuple[str, ...]) -> CheckpointReader | None:
        """The checkpoint that `run.resume` asks for, or None where there is nothing to resume.

        Reads only: what it refuses is refused before anything is written or built. Collective: call on every
        rank.

        Raises:
            CheckpointError: `resume` names no whole checkpoint.
            ConfigError: the checkpoint is of a run with another identity.
        """
        chosen, own = agree.decided_by_first(lambda: (self._choose(resume), read_rollback(self.folder)))
        for line in chosen.passed_over:
            say(f"passed over {line}", self._process)
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
        if (path / COMMIT).exists():
            reason = damage(path)
            if reason:
                raise CheckpointError(f"run.resume={path} is not a whole checkpoint: {reason}")
            return Found(path, ())
        found = newest_whole(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if found.folder is None:
            raise CheckpointError(f"run.resume={path}: no whole checkpoint there")
        return found

    def _check_identity(self, folder: Path, saved: Mapping[str, Any], allow_change: tuple[str, ...]) -> None:
        for key, value in self.identity.items():
            if key in saved and saved[key] != value and key not in allow_change:
                remedy = "use another run.dir"
                if "." in key:  # the stage is no setting, and nothing of one fits into the other
                    remedy += f", or allow it with --run.allow_change {key}"
                raise ConfigError(f"{key} is {value}, but {folder} was trained with {saved[key]}: {remedy}")

    def _finish(self, temporary: Path, final: Path, files: dict[str, Any], state: RunState) -> None:
        write_state(temporary / STATE, SavedState(state, self.identity, _versions()))
        write_whole(temporary / CONFIG, self._config_yaml)
        for name in (STATE, CONFIG):
            files[name] = checksum(temporary / name)
        if final.exists():  # a damaged one, or one of the steps that run.resume=PATH went back behind
            _remove(final)
        temporary.replace(final)
        sync(final.parent)
        write_whole(final / COMMIT, json.dumps({"files": files}, indent=1) + "\n")
        self._retain(state.health.last_healthy_step)

    def _retain(self, last_healthy_step: int) -> None:
        """Removes what is older than the newest `keep` finished checkpoints; unfinished ones do not count.

        The newest one that is known to be healthy stays too: a run that has diverged goes back to it.
        """
        finished = [path for path in checkpoints_of(self.folder) if (path / COMMIT).exists()]
        healthy = [path for path in finished if int(path.name[5:]) <= last_healthy_step]
        for path in checkpoints_of(self.folder):
            if path not in finished[: self._keep] and path not in healthy[:1]:
                _remove(path)

    def _without_void(self) -> Rollback | None:
        """Removes what the run's last rollback has made void, and returns that rollback. Rank 0 only."""
        rollback = read_rollback(self.folder)
        if rollback is not None:
            for path in filter(rollback.voids, checkpoints_of(self.folder)):
                try:
                    _remove(path)
                except OSError as error:
                    raise CheckpointError(f"{path} holds diverged weights: {error.strerror}") from error
        return rollback

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Runs a rank's part of a collective save; one rank's failure is every rank's CheckpointError."""
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failed = agree.first_error(error)
        if failed:
            rank, kind, message = failed
            raise CheckpointError(
                f"checkpoint not written: rank {rank}: {kind}: {message}; the older checkpoints are untouched"
            ) from error
        return result


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint so that what a crash leaves behind is not taken for one."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
