"""What a run does when it diverges: back to a checkpoint, and on with the data behind the bad stretch."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kandinsky_dist.checkpoint.layout import CheckpointReader, RunState, folder_name, read_state
from kandinsky_dist.checkpoint.manager import CheckpointManager, newest_whole
from kandinsky_dist.checkpoint.rollback import Rollback, read_rollback, write_rollback
from kandinsky_dist.config.schema import GuardConfig
from kandinsky_dist.errors import CheckpointError, DivergedError
from kandinsky_dist.faults.divergence import Divergence
from kandinsky_dist.parallel.base import ModelPlan, Strategy
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.disk import write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process

LOG = "rollbacks.jsonl"


class Guard:
    """Watches the health of one run. Collective: made and used on every rank.

    Args:
        run_dir: the run's folder.
        plan: of the model, whose initial weights are gone back to where there is no checkpoint yet.

    Raises:
        DivergedError: the run had gone back too often already.
    """

    def __init__(
        self,
        guard: GuardConfig,
        run_dir: Path,
        checkpoints: CheckpointManager,
        plan: ModelPlan,
        process: Process,
    ) -> None:
        self.config = guard
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._plan = plan
        self._process = process
        rollback = agree.decided_by_first(lambda: read_rollback(checkpoints.folder))
        if rollback is not None:
            self._settle(rollback)

    def judge(
        self, state: RunState, losses: Sequence[float], skipped: Sequence[bool], rescaled: Sequence[bool]
    ) -> Divergence | None:
        """Judges the steps since the last log entry, up to the state's; the same on every rank.

        Args:
            losses: of each step, over all ranks.
            skipped: whether the step was skipped.
            rescaled: whether it was, and the loss scale lowered.
        """
        state.num_skipped_steps += sum(skipped)
        first_step = state.step - len(losses) + 1
        return state.health.judge(self.config, first_step, losses, skipped, rescaled)

    def go_back(
        self, strategy: Strategy, state: RunState, divergence: Divergence
    ) -> tuple[RunState, CheckpointReader | None]:
        """Loads the newest whole checkpoint from before the divergence. Collective: call on every rank.

        What is being written is written first: it may be what is gone back to. The loader and what it has
        fetched ahead stay as they are: the position that the run has reached does not change, it only belongs
        to an earlier step from now on.

        Returns:
            The checkpoint's state at the position that was reached; and the checkpoint, if there is one.

        Raises:
            DivergedError: the run has gone back too often.
            CheckpointError: there is no checkpoint to go back to.
        """
        self._checkpoints.finish()
        rollback = agree.decided_by_first(lambda: self._decide(state, divergence))
        self._settle(rollback)
        say(
            f"diverged since step {rollback.diverged_since_step}: {rollback.reason}; goes back from step "
            f"{rollback.step} to {_name(rollback)}, passing over samples {rollback.first_position:,} to "
            f"{rollback.last_position:,}",
            self._process,
        )
        folder = self._checkpoints.folder / folder_name(rollback.to_step)
        reader = CheckpointReader(folder) if rollback.to_step else None
        return self._checkpoints.restore(strategy, reader, self._plan), reader

    def _decide(self, state: RunState, divergence: Divergence) -> Rollback:
        """Chooses the checkpoint and makes the rollback a fact. Rank 0 only."""
        folder = self._checkpoints.folder
        found = newest_whole(folder, at_most_step=divergence.last_healthy_step).folder
        if found is None and state.began_at_step > 0:
            raise CheckpointError(
                f"diverged since step {divergence.since_step}: {divergence.reason}; the run began at step "
                f"{state.began_at_step} of another run and {folder} holds no checkpoint from before the "
                "divergence: begin it once more in another run.dir, with a lower checkpoint.every_steps or "
                "optim.learning_rate"
            )
        target = RunState() if found is None else read_state(found).run
        before = read_rollback(folder)
        if before is not None:
            target = before.continued(target)
        rollback = Rollback(
            number=state.num_rollbacks + 1,
            step=state.step,
            diverged_since_step=divergence.since_step,
            reason=divergence.reason,
            to_step=target.step,
            first_position=target.samples_consumed,
            last_position=state.samples_consumed - 1,
            num_bad_samples=state.num_bad_samples,
            identity=self._checkpoints.identity,
        )
        write_rollback(folder, rollback)
        return rollback

    def _settle(self, rollback: Rollback) -> None:
        """Writes a rollback down where that is not done yet, and judges whether it was one too many.

        The same at the time and at every later start: a run that is killed between the two loses nothing.
        """
        agree.decided_by_first(lambda: self._write_down(rollback))
        if rollback.number > self.config.max_rollbacks:
            raise DivergedError(
                f"diverged since step {rollback.diverged_since_step}: {rollback.reason}; the run has gone "
                f"back as often as guard.max_rollbacks={self.config.max_rollbacks} allows: lower "
                f"optim.learning_rate, look at samples {rollback.first_position:,} to "
                f"{rollback.last_position:,} ({self._run_dir / LOG}), and go on from {_name(rollback)} with "
                f"guard.max_rollbacks={rollback.number}"
            )

    def _write_down(self, rollback: Rollback) -> None:
        entry = {key: value for key, value in asdict(rollback).items() if key != "identity"}
        entry["checkpoint"] = _name(rollback)
        line = json.dumps(entry) + "\n"
        path = self._run_dir / LOG
        try:
            written = path.read_text() if path.exists() else ""
            if line not in written:
                write_whole(path, written + line)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error


def _name(rollback: Rollback) -> str:
    return folder_name(rollback.to_step) if rollback.to_step else "the initial weights"
