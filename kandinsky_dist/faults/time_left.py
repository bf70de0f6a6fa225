"""When a run must stop by itself, so that its last checkpoint is written before its end. No torch."""

import datetime
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping

SAVE_SAFETY = 1.5
"""A checkpoint is taken to need this many times as long as the longest one did."""
SCONTROL_SECONDS = 20.0


def job_end(environ: Mapping[str, str]) -> float | None:
    """When the job that this process belongs to is ended, seconds since 1970; None where nothing says it.

    From SLURM_JOB_END_TIME (Slurm 22.05 and later), else scontrol is asked, once.
    """
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    job = environ.get("SLURM_JOB_ID", "")
    if not job or shutil.which("scontrol", path=environ.get("PATH")) is None:
        return None
    try:
        said = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            env=dict(environ),
        ).stdout
        found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", said)
        return datetime.datetime.fromisoformat(found[1]).timestamp() if found else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


class TimeLeft:
    """The time to a run's end, against what its steps and checkpoints take.

    Args:
        end: when the process is ended, seconds since 1970; None for never.
        margin_seconds: that must be left after the last checkpoint.
        save_seconds: longest that a checkpoint took so far, 0 where that is unknown.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        end: float | None,
        margin_seconds: float,
        save_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.end = end
        self.save_seconds = save_seconds
        self._margin_seconds = margin_seconds
        self._clock = clock
        self._last_step: float | None = None
        self._step_seconds = 0.0  # the longest, and what came with it: a log entry, a validation

    def seconds(self) -> float:
        """Seconds to the end; infinite without one."""
        return float("inf") if self.end is None else self.end - self._clock()

    def saw_save(self, seconds: float) -> None:
        """Takes in how long a checkpoint took, from the first copy to its last file."""
        self.save_seconds = max(self.save_seconds, seconds)

    def saw_step(self) -> None:
        """Takes in that a step is done; what lay between two of them is a step's time, after the first."""
        now = self._clock()
        if self._last_step is not None:
            self._step_seconds = max(self._step_seconds, now - self._last_step)
        self._last_step = now

    @property
    def needed_seconds(self) -> float:
        """What a checkpoint and the way out need."""
        return SAVE_SAFETY * self.save_seconds

    def must_stop(self) -> bool:
        """Whether the run must stop now: two more steps may pass before all ranks do."""
        return self.seconds() < self.needed_seconds + 2 * self._step_seconds + self._margin_seconds

    def may_save(self) -> bool:
        """Whether a checkpoint that is begun now is written before the end."""
        return self.seconds() > self.needed_seconds
