"""What a run that went back leaves beside its checkpoints: which of them are void, and where it goes on.

The file is small and written whole, and with it the run has gone back: whether it is killed before or after,
and whether the void checkpoints have been removed yet or not, the next start finds the same state.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kandinsky_dist.checkpoint.layout import RunState, read_state, step_of
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.runtime.disk import write_whole

ROLLBACK = "rollback.json"


@dataclass(frozen=True)
class Rollback:
    """The last time that a run has gone back.

    Attributes:
        number: 1 for the first of the run.
        step: that the run had reached.
        diverged_since_step: first step of the divergence.
        reason: what was seen, for people.
        to_step: of the checkpoint that it went back to; 0 for the initial weights.
        first_position, last_position: of the samples that the weights no longer know, nor ever will.
        num_bad_samples: damaged samples up to the last position.
        identity: of the run, as in a checkpoint.
    """

    number: int
    step: int
    diverged_since_step: int
    reason: str
    to_step: int
    first_position: int
    last_position: int
    num_bad_samples: int
    identity: Mapping[str, Any]

    def voids(self, checkpoint: Path) -> bool:
        """Whether a checkpoint was written between the one gone back to and the going back."""
        if step_of(checkpoint) <= self.to_step:
            return False
        try:
            return read_state(checkpoint).run.num_rollbacks < self.number
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not whole, which is found out elsewhere

    def continued(self, state: RunState) -> RunState:
        """Where the run goes on from a state: behind the samples that were passed over."""
        if state.num_rollbacks >= self.number:
            return state
        return replace(
            state,
            samples_consumed=self.last_position + 1,
            num_bad_samples=self.num_bad_samples,
            num_rollbacks=self.number,
        )


def read_rollback(folder: Path) -> Rollback | None:
    """The last rollback of the run whose checkpoints a folder holds, or None.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / ROLLBACK
    try:
        return Rollback(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} says which checkpoints hold diverged weights and cannot be read ({error}): restore it, "
            "or remove it together with the checkpoints that may be such"
        ) from error


def write_rollback(folder: Path, rollback: Rollback) -> None:
    """Makes a run go back.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ROLLBACK, json.dumps(asdict(rollback), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder / ROLLBACK}: {error.strerror}; the run cannot go back") from error
