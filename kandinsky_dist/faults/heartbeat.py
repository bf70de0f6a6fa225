"""What each rank says of itself, in one small file: where it is, how long, and how it ended. No torch.

    heartbeat/start_00003/rank_00001.json

A folder for each start of the run: a process of an earlier start that is still alive somewhere writes into a
folder of its own, and finds out that it is too late when that is gone.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILES_PER_SECOND = 50.0
"""Most that a whole run writes, whatever its world size: a shared file system serves others too.

With each a rank reads its neighbour's, and looks once whether there is a verdict.
"""


@dataclass(frozen=True)
class Beat:
    """One rank's word.

    Attributes:
        rank: of the process.
        host: its machine.
        pid: its process there.
        count: beats before this one.
        time: of this beat, seconds since 1970 by the clock of its host.
        every_seconds: how soon the next one is to be expected.
        step: optimizer steps that are done.
        phase: what it is doing.
        moves: phases it has begun since its start; all ranks go through the same ones in the same order.
        phase_seconds: how long it has been in the phase.
        limit_seconds: how long it may be; 0 for ever.
        silence_seconds: how long it may say nothing; 0 for ever.
        save_seconds: longest that a checkpoint has taken; 0 before the first.
        exit_code: how it ended; None while it is alive.
        line: why it ended, for people.
    """

    rank: int
    host: str
    pid: int
    count: int
    time: float
    every_seconds: float
    step: int
    phase: str
    moves: int
    phase_seconds: float
    limit_seconds: float
    silence_seconds: float
    save_seconds: float = 0.0
    exit_code: int | None = None
    line: str = ""

    @property
    def is_overdue(self) -> bool:
        """Whether the rank has been in its phase for longer than it may."""
        return 0 < self.limit_seconds < self.phase_seconds

    def is_lost(self, now: float) -> bool:
        """Whether it has been silent for longer than it may."""
        return self.exit_code is None and 0 < self.silence_seconds < now - self.time


def beat_every_seconds(asked: float, world_size: int) -> float:
    """Seconds between two beats of a rank: as asked for, or more where there are very many ranks."""
    return max(asked, world_size / FILES_PER_SECOND)


def start_folder(run_dir: Path, start: int) -> Path:
    """Where the ranks of one start of a run beat."""
    return run_dir / "heartbeat" / f"start_{start:05d}"


def beat_file(folder: Path, rank: int) -> Path:
    """One rank's file."""
    return folder / f"rank_{rank:05d}.json"


def write_beat(folder: Path, beat: Beat) -> None:
    """Replaces a rank's last beat. A reader sees the old or the new one; neither needs to outlive a crash.

    Raises:
        OSError: it could not be written.
    """
    path = beat_file(folder, beat.rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(beat)))
    temporary.replace(path)


def read_beat(path: Path) -> Beat | None:
    """A rank's last beat; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(path.read_text())
        known = {item.name for item in fields(Beat)}
        return Beat(**{key: value for key, value in found.items() if key in known})
    return None


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last beat of every rank that has one."""
    with contextlib.suppress(OSError):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
        beats = [read_beat(folder / name) for name in names]
        return {beat.rank: beat for beat in beats if beat is not None}
    return {}
