"""Handing a job to Slurm."""

import getpass
import re
import subprocess
import sys
from pathlib import Path

from kandinsky_dist.errors import ConfigError


def send(script: str) -> int:
    """Submits a file's text through sbatch, from the current folder, and returns the job's id.

    Raises:
        ConfigError: there is no sbatch, or it refuses.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script.encode(), capture_output=True)
    except FileNotFoundError:
        raise ConfigError(
            "sbatch is not on PATH: submit from a login node of the cluster; --dry-run prints the file"
        ) from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {'; '.join(said.splitlines()) or done.returncode}")
    if said:  # what the site says to everyone
        print(said, file=sys.stderr)
    answer = done.stdout.decode(errors="replace").strip()
    job, _, _cluster = answer.partition(";")
    if not job.isdigit():
        raise ConfigError(f"sbatch --parsable answered {answer!r}, which is no job's id: look into squeue")
    return int(job)


def make_log_folder(output: str) -> None:
    """Makes the folder of a log: without it Slurm ends a job at once and can tell nobody why."""
    folder = Path(output).parent
    if "%" not in str(folder):
        folder.mkdir(parents=True, exist_ok=True)


def log_path(output: str, *, name: str, job: int) -> Path:
    """Where sbatch puts the log, as far as that is known before the job starts."""
    known = {"%%": "%", "%j": str(job), "%A": str(job), "%x": name, "%u": _user()}
    return Path.cwd() / re.sub(r"%.", lambda found: known.get(found[0], found[0]), output)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "%u"
