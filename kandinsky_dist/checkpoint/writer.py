"""One checkpoint on the disk: atomic, checked, agreed on all ranks."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    CONFIG,
    STATE,
    TEMPORARY,
    RankTensors,
    RunState,
    SavedState,
    checkpoints_of,
    checksum,
    folder_name,
    step_of,
    write_state,
    write_tensors,
)
from kandinsky_dist.errors import CheckpointError, KandinskyError
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.disk import sync, write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process, cpu_group

_VERSIONED = ("kandinsky-dist", "torch", "diffusers", "transformers", "deepspeed")


class Writer:
    """Writes a run's checkpoints. Collective: made on every rank, whose main threads do it at one place.

    Args:
        folder: of all checkpoints.
        process: this rank.
        keep: how many finished checkpoints stay.
        identity: goes into state.json.
        config_yaml: the resolved configuration.
        fence: this start's claim to the run folder.
    """

    def __init__(
        self,
        folder: Path,
        process: Process,
        *,
        keep: int,
        identity: Mapping[str, Any],
        config_yaml: str,
        fence: Fence,
    ) -> None:
        self._folder = folder
        self._process = process
        self._keep = keep
        self._identity = identity
        self._config_yaml = config_yaml
        self._fence = fence
        # Its own: what ranks agree on while they write is not to be mistaken for what they train on.
        self._group = cpu_group()
        self._given_up: set[Path] = set()

    def give_up(self, damaged: Iterable[Path]) -> None:
        """Tells which checkpoints are not worth keeping, although they were finished once."""
        self._given_up.update(damaged)

    def write(self, tensors: Callable[[], RankTensors], state: RunState) -> None:
        """Writes a checkpoint, durable on return. Collective: call on every rank, from any one thread.

        Args:
            tensors: gives what this rank saves.
            state: where the run stands.

        Raises:
            CheckpointError: a rank could not write (named); the run's older checkpoints are untouched.
            FencedError: the run folder is another start's.
        """
        self._check_fence()
        final = self._folder / folder_name(state.step)
        # Of this start alone: an older one may still be writing the same step.
        temporary = final.with_name(f"{final.name}.{self._fence.start}{TEMPORARY}")
        is_first = self._process.is_first
        self._attempt(lambda: _fresh(temporary) if is_first else None)
        name = f"rank_{self._process.rank:05d}.safetensors"

        def write() -> dict[str, Any]:
            write_tensors(temporary / name, tensors())
            return checksum(temporary / name)

        try:
            mine = self._attempt(write)
            files = dict(agree.gather((name, mine), self._group))
            self._check_fence()
            self._attempt(lambda: self._finish(temporary, final, files, state) if is_first else None)
        except KandinskyError:
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            self._check_fence()  # what lies there may be a newer start's, and the reason
            if is_first and not (final / COMMIT).exists():  # renamed, but no room for the last file
                shutil.rmtree(final, ignore_errors=True)
            raise

    def _check_fence(self) -> None:
        agree.decided_by_first(self._fence.check, self._group)

    def _finish(self, temporary: Path, final: Path, files: dict[str, Any], state: RunState) -> None:
        saved = SavedState(state, self._identity, versions())
        commit(temporary, final, files, saved, self._config_yaml, check=self._fence.check)
        self._given_up.discard(final)
        self._retain(state)

    def _retain(self, state: RunState) -> None:
        """Removes what is older than the newest `keep` finished checkpoints, and all unfinished ones.

        The newest one that is known to be healthy stays too: a run that has diverged goes back to it. A
        damaged one counts as unfinished, and so does one of a step that the run has yet to reach: it was not
        whole when the run continued. What cannot be removed stays: the new one is written all the same.
        """
        finished = [
            path
            for path in checkpoints_of(self._folder)
            if path not in self._given_up and step_of(path) <= state.step and (path / COMMIT).exists()
        ]
        healthy = [path for path in finished if step_of(path) <= state.health.last_healthy_step]
        for path in checkpoints_of(self._folder):
            if path not in finished[: self._keep] and path not in healthy[:1]:
                self._fence.check()
                try:
                    remove(path)
                except OSError as error:  # on NFS a file that somebody reads keeps its folder
                    say(f"{path} is no longer needed and cannot be removed: {error.strerror}", self._process)
        for path in self._folder.glob(f"step_*{TEMPORARY}"):
            self._fence.check()
            shutil.rmtree(path, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Runs a rank's part of a collective save; one rank's failure is every rank's CheckpointError."""
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failed = agree.first_error(error, self._group)
        if failed:
            rank, kind, message = failed
            raise CheckpointError(
                f"checkpoint not written: rank {rank}: {kind}: {message}; the older checkpoints are untouched"
            ) from error
        return result


def commit(
    temporary: Path,
    final: Path,
    files: dict[str, Any],
    saved: SavedState,
    config_yaml: str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Makes a whole checkpoint of a folder in which the tensors of all ranks are; durable on return.

    Args:
        temporary: the folder, which is renamed.
        final: replaced where it is there: it was damaged.
        files: checksum of each file of tensors, by its name.
        saved: goes into state.json.
        config_yaml: the resolved configuration.
        check: called before each change to `final`, and raises where that is no longer ours: a process that
            was held for a while in the middle of this goes on here.
    """
    write_state(temporary / STATE, saved)
    write_whole(temporary / CONFIG, config_yaml)
    files = files | {name: checksum(temporary / name) for name in (STATE, CONFIG)}
    check()
    if final.exists():
        remove(final)
    temporary.replace(final)
    sync(final.parent)
    check()
    write_whole(final / COMMIT, json.dumps({"files": files}, indent=1) + "\n")


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove(folder: Path) -> None:
    """Removes a checkpoint so that what a crash leaves is not taken for one; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def versions() -> dict[str, str]:
    """What writes checkpoints here: package -> version."""
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
