"""Slurm's commands, called from Python. No torch."""

import subprocess
from collections.abc import Sequence

from kandinsky_dist.errors import ConfigError


def run_slurm(command: Sequence[str], *, timeout: float | None = None) -> str:
    """Runs a command of Slurm on this host and returns what it printed.

    Args:
        timeout: seconds.

    Raises:
        ConfigError: there is no such command, it refuses, or it does not answer in time.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout).stdout
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not here: run this on a host of the cluster") from error
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout).split())
        raise ConfigError(f"{' '.join(command[:3])}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{' '.join(command[:3])}: no answer in {timeout} s; see sdiag") from error
