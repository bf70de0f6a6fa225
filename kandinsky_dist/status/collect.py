"""Reads a run folder, while the run is under way on other machines or after it has ended."""

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kandinsky_dist.checkpoint.files import TEMPORARY, checkpoints_of, promised_files
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.faults.fence import Owner, read_owner
from kandinsky_dist.faults.heartbeat import Beat, read_beats, start_folder

TAIL_BYTES = 256 * 1024
"""Of metrics.jsonl: the newest entries, however long the run is."""
RECENT_ENTRIES = 20
"""Log entries whose stragglers are of interest."""
MISSED_BEATS = 4
FIRST_BEAT_SECONDS = 120
STOPPED = 75


@dataclass(frozen=True)
class Status:
    """How a run is doing.

    Attributes:
        run_dir: its folder.
        state: running, stalled (some ranks say nothing), lost (all of them, and they were not heard to end),
            stopped (75, to be continued), failed, finished, or unknown (no start has left its name).
        detail: what is to be said of the state.
        step: optimizer steps done, by the newest sign; None before the first.
        max_steps: of the run; None where the configuration cannot be read.
        figures: the last log entry.
        eta_seconds: to the last step, at the rate of the last log entry; None unless running.
        last_checkpoint: name of the newest finished one.
        last_checkpoint_problem: what is wrong with its files by name and size; None if nothing is.
        is_writing: whether a checkpoint is being written.
        num_restarts: starts after the first.
        num_rollbacks: times that the run went back.
        num_bad_samples: that were replaced.
        stragglers: rank -> in how many of the last entries the others waited for it.
        world_size: ranks of the newest start.
        host: of its rank 0.
        job: of the cluster, or empty.
        running_seconds: since the newest start.
    """

    run_dir: str
    state: str
    detail: str
    step: int | None = None
    max_steps: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    eta_seconds: float | None = None
    last_checkpoint: str | None = None
    last_checkpoint_problem: str | None = None
    is_writing: bool = False
    num_restarts: int = 0
    num_rollbacks: int = 0
    num_bad_samples: int = 0
    stragglers: Mapping[int, int] = field(default_factory=dict)
    world_size: int | None = None
    host: str = ""
    job: str = ""
    running_seconds: float | None = None


def collect(run_dir: Path, now: float | None = None) -> Status:
    """Looks at a run folder once.

    Args:
        run_dir: the run's folder.
        now: seconds since 1970; None asks the clock.

    Raises:
        ConfigError: it is no run folder.
    """
    now = time.time() if now is None else now
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} is no run folder: it has no config.yaml")
    owner = read_owner(run_dir)
    beats = read_beats(start_folder(run_dir, owner.start)) if owner else {}
    state, detail = judge(owner, beats, now)
    entries = last_entries(run_dir / "metrics.jsonl")
    last = entries[-1] if entries else {}
    # A start that has not restored its state yet is at step 0, and an entry may be of a step that was lost.
    step = max((beat.step for beat in beats.values()), default=0) or last.get("step")
    max_steps = _max_steps(run_dir)
    seconds = last.get("step_seconds")
    eta = None
    if state == "running" and seconds and step is not None and max_steps is not None:
        eta = max(0, max_steps - step) * seconds
    checkpoints = [path for path in checkpoints_of(run_dir / "checkpoints") if (path / "COMMIT").exists()]
    ended = [beat.time for beat in beats.values() if beat.exit_code is not None]
    until = max(ended) if ended and state not in ("running", "stalled") else now
    return Status(
        run_dir=str(run_dir),
        state=state,
        detail=detail,
        step=step,
        max_steps=max_steps,
        figures=last,
        eta_seconds=eta,
        last_checkpoint=checkpoints[0].name if checkpoints else None,
        last_checkpoint_problem=_problem(checkpoints[0]) if checkpoints else None,
        is_writing=state == "running" and any((run_dir / "checkpoints").glob(f"step_*{TEMPORARY}")),
        num_restarts=owner.start - 1 if owner else 0,
        num_rollbacks=last.get("rollbacks") or 0,
        num_bad_samples=last.get("bad_samples") or 0,
        stragglers=Counter(
            entry["straggler_rank"] for entry in entries[-RECENT_ENTRIES:] if "straggler_rank" in entry
        ),
        world_size=owner.world_size if owner else None,
        host=owner.host if owner else "",
        job=owner.job if owner else "",
        running_seconds=until - owner.began if owner else None,
    )


def judge(owner: Owner | None, beats: Mapping[int, Beat], now: float) -> tuple[str, str]:
    """State and detail of the newest start."""
    if owner is None:
        return "unknown", "no start has left its name"
    running = [beat for beat in beats.values() if beat.exit_code is None]
    if not running and beats:
        return _end(list(beats.values()))
    silent = [beat for beat in running if now - beat.time > MISSED_BEATS * beat.every_seconds]
    failed = [beat for beat in beats.values() if beat.exit_code not in (None, 0)]
    if failed and len(silent) == len(running):
        return _end(failed)
    if running and len(silent) == len(running):
        longest = min(now - beat.time for beat in silent)
        return "lost", f"no rank has said anything for {longest:.0f} s, and none was heard to end"
    if silent or failed:
        ranks = [*silent, *failed]
        named = ", ".join(f"{beat.rank} ({beat.host})" for beat in ranks[:8])
        return "stalled", f"{len(ranks)} of {owner.world_size} ranks say nothing: {named}"
    if not beats:
        is_new = now - owner.began < FIRST_BEAT_SECONDS
        return "running" if is_new else "lost", "no rank has said anything yet"
    last = min(running, key=lambda beat: (beat.moves, -beat.phase_seconds))
    return "running", f"in {last.phase} for {last.phase_seconds + max(0, now - last.time):.0f} s"


def _end(beats: list[Beat]) -> tuple[str, str]:
    """How ranks that have all ended did: what is meant for people counts before a crash that followed."""
    codes = [beat.exit_code for beat in beats]
    worst = max(beats, key=lambda beat: (beat.exit_code in (65, 78), beat.exit_code not in (0, STOPPED)))
    if all(code == 0 for code in codes):
        return "finished", ""
    if all(code in (0, STOPPED) for code in codes):
        return "stopped", next(beat.line for beat in beats if beat.exit_code == STOPPED)
    return "failed", f"{worst.line} (exit code {worst.exit_code})"


def last_entries(path: Path) -> list[dict[str, Any]]:
    """The newest entries of a metrics file, oldest first; half a line at either end is left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines[1:-1] if size > TAIL_BYTES else lines[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            int(entry["step"])
            found.append(entry)
    return found


def _max_steps(run_dir: Path) -> int | None:
    try:
        return int(yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell."""
    try:
        promised = promised_files(folder)
    except (OSError, ValueError) as error:
        return f"COMMIT cannot be read: {error}"
    for name, expected in promised.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected["bytes"]:
            return f"{name} has {found} bytes, {expected['bytes']} were written"
    return None


def is_number(value: Any) -> bool:
    """Whether a figure of a log entry is there and finite."""
    return isinstance(value, int | float) and math.isfinite(value)
