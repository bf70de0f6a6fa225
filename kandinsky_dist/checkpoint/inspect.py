"""What a run has saved, for people."""

from collections.abc import Iterator
from pathlib import Path

from kandinsky_dist.checkpoint.layout import COMMIT, checkpoints_of, damage, promised_files, read_state
from kandinsky_dist.errors import CheckpointError


def describe(run_dir: Path, *, is_deep: bool) -> Iterator[str]:
    """One line a checkpoint, newest first.

    Args:
        run_dir: the run's folder.
        is_deep: read every byte and compare it with the checksums.

    Raises:
        CheckpointError: there is no checkpoint; or, with `is_deep`, after the last line, one is not whole.
    """
    folders = checkpoints_of(run_dir / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run_dir} has no checkpoints")
    num_damaged = 0
    for folder in folders:
        reason = damage(folder) if is_deep else None if (folder / COMMIT).exists() else "never finished"
        num_damaged += reason is not None
        if reason:
            yield f"{folder.name}  not whole: {reason}"
            continue
        try:
            num_bytes = sum(item["bytes"] for item in promised_files(folder).values())
            state = read_state(folder).run
        except (OSError, ValueError, KeyError, TypeError):
            yield f"{folder.name}  not whole: {damage(folder)}"
            continue
        word = "whole" if is_deep else "finished"
        yield f"{folder.name}  {state.samples_consumed:,} samples  {num_bytes / 2**20:,.1f} MiB  {word}"
    if num_damaged and is_deep:
        raise CheckpointError(f"{num_damaged} of {len(folders)} checkpoints in {run_dir} are not whole")
