"""Where the checkout is whose scripts a job runs."""

from collections.abc import Mapping
from pathlib import Path

from kandinsky_dist.errors import ConfigError

SCRIPT = Path("slurm", "train.sh")
VARIABLE = "KANDINSKY_HOME"


def find_checkout(environ: Mapping[str, str]) -> Path:
    """The folder with slurm/train.sh: KANDINSKY_HOME, else the one that this package lies in.

    Raises:
        ConfigError: it is not there.
    """
    told = environ.get(VARIABLE)
    folder = Path(told).absolute() if told else Path(__file__).resolve().parents[2]
    if (folder / SCRIPT).is_file():
        return folder
    if told:
        raise ConfigError(f"{VARIABLE}={told} has no {SCRIPT}: set it to a checkout that all nodes see")
    raise ConfigError(
        f"this package was installed without {SCRIPT}: set {VARIABLE} to a checkout that all nodes see"
    )
