"""Whose a run folder is: the newest start takes it, and an older one that is still alive keeps its hands off.

A node that was declared dead may go on training while its job runs again elsewhere. No torch.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kandinsky_dist.errors import FencedError
from kandinsky_dist.faults.heartbeat import beat_file, read_beat, start_folder
from kandinsky_dist.runtime.disk import write_whole

OWNER = "owner.json"


@dataclass(frozen=True)
class Owner:
    """The start that a run folder belongs to.

    Attributes:
        start: 1 for the first start of the run.
        token: tells two starts apart that took the same number at the same moment.
        host: of rank 0.
        pid: of rank 0.
        job: of the cluster, or empty.
        began: seconds since 1970.
        world_size: its ranks.
        save_seconds: longest that a checkpoint took in the start before; 0 where that is unknown.
    """

    start: int
    token: str
    host: str
    pid: int
    job: str
    began: float
    world_size: int
    save_seconds: float = 0.0


def read_owner(run_dir: Path) -> Owner | None:
    """The newest start of a run; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Owner(**json.loads((run_dir / OWNER).read_text()))
    return None


class Fence:
    """One start's claim to a run folder; before `take` or `join` there is none, and nothing to check.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._owner: Owner | None = None

    @property
    def start(self) -> int:
        """Number of this start of the run; 0 without a claim."""
        return self._owner.start if self._owner else 0

    def take(self, world_size: int, environ: Mapping[str, str] = os.environ) -> Owner:
        """Takes the folder, whoever has it. Rank 0 only.

        Raises:
            OSError: it cannot be written.
        """
        before = read_owner(self._run_dir)
        start = before.start + 1 if before else 1
        last_beat = read_beat(beat_file(start_folder(self._run_dir, start - 1), 0))
        owner = Owner(
            start=start,
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=environ.get("SLURM_JOB_ID", ""),
            began=time.time(),
            world_size=world_size,
            save_seconds=max(
                last_beat.save_seconds if last_beat else 0, before.save_seconds if before else 0
            ),
        )
        write_whole(self._run_dir / OWNER, json.dumps(asdict(owner), indent=1) + "\n")
        beats = start_folder(self._run_dir, start)
        shutil.rmtree(beats.parent, ignore_errors=True)
        beats.mkdir(parents=True, exist_ok=True)
        return owner

    def join(self, owner: Owner) -> None:
        """Acts under the claim that rank 0 has taken."""
        self._owner = owner

    def check(self) -> None:
        """Returns if the folder is still this start's.

        Where the file cannot be read the claim stands: what is written next will fail by itself.

        Raises:
            FencedError: a newer start has taken it.
        """
        found = read_owner(self._run_dir)
        if self._owner is None or found is None or found.token == self._owner.token:
            return
        job = f", job {found.job}" if found.job else ""
        raise FencedError(
            f"run.dir={self._run_dir} was taken over by start {found.start} of this run ({found.host}, "
            f"process {found.pid}{job}): this one, start {self._owner.start}, ends and leaves all as it is; "
            "run one at a time, or choose another run.dir"
        )
