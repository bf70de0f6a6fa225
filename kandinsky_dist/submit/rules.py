"""What options of a job may be, before anything is queued."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from kandinsky_dist.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"SECRET|PASSWORD|PASSWD|CREDENTIAL|(TOKEN|KEY)S?(_|$)", re.IGNORECASE)
_LONG_OPTION = re.compile(r"(?:--)?([a-z][a-z0-9-]*)(=.*)?")

# Number of ranks and what they run were checked, so they are said in one place only.
_DECIDED_VARIABLES = {
    "KANDINSKY_COMMAND": "submit itself",
    "KANDINSKY_CONFIG": "--config",
    "KANDINSKY_SRUN": "--srun",
    "KANDINSKY_TASKS": "--tasks-per-node",
    "NPROC_PER_NODE": "--gpus-per-node",
    "VIRTUAL_ENV": "--venv",
}
_DECIDED_OPTIONS = {
    "array": "submit: two jobs cannot share a run folder",
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "nodes": "--nodes",
    "ntasks": "--tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "tasks-per-node": "--tasks-per-node",
}


def check_text(name: str, value: str) -> None:
    """Refuses a value that is no part of one line, or nothing at all.

    Raises:
        ConfigError: it is empty, or holds a line break or another control character.
    """
    if not value.strip():
        raise ConfigError(f"{name} is empty: give a value or leave it out")
    if not value.isprintable():
        raise ConfigError(f"{name} {value!r} holds a line break or control character: leave it out")


def check_absolute(name: str, path: str) -> None:
    """Refuses a relative path, which would be another folder wherever a job starts.

    Raises:
        ConfigError: the path is relative.
    """
    if not PurePosixPath(path).is_absolute():
        raise ConfigError(f"{name}={path} must be an absolute path, on a file system that all nodes see")


def variable(assignment: str) -> tuple[str, str]:
    """NAME=VALUE in two parts.

    Raises:
        ConfigError: no such name, one that another option decides, or one that looks like a secret's, whose
            value anyone who may see the job could read.
    """
    name, equals, value = assignment.partition("=")
    if not equals or not _VARIABLE.fullmatch(name):
        shown = name if equals else "it"  # what follows may be a secret
        raise ConfigError(f"--env takes NAME=VALUE with a variable's name, {shown!r} is none")
    if _SECRET.search(name):
        raise ConfigError(
            f"--env {name} looks like a secret, and the job's file is no place for one: "
            f"export {name} before you submit, sbatch passes the environment on"
        )
    if name in _DECIDED_VARIABLES:
        raise ConfigError(f"--env {name} is decided by {_DECIDED_VARIABLES[name]}: leave it out")
    if value:
        check_text(f"--env {name}", value)
    return name, value


def option(flag: str, text: str) -> str:
    """A long option of sbatch or srun, with its dashes.

    Args:
        flag: the option of ours that it was given with.
        text: NAME, NAME=VALUE, or the same behind two dashes.

    Raises:
        ConfigError: it is no long option, or one that an option of ours decides.
    """
    check_text(flag, text)
    found = _LONG_OPTION.fullmatch(text)
    if found is None:
        raise ConfigError(f"{flag} {text!r} is no long option: write {flag}=--name=value, or name=value")
    if found[1] in _DECIDED_OPTIONS:
        raise ConfigError(f"{flag} {text} is decided by {_DECIDED_OPTIONS[found[1]]}: leave it out")
    return f"--{found[1]}{found[2] or ''}"


def mounts(given: Iterable[str], checkout: Path) -> list[str]:
    """SOURCE[:TARGET[:FLAGS]] of each folder that a container sees; the checkout is among them.

    Raises:
        ConfigError: a folder is not absolute, or its name holds a comma, which separates mounts.
    """
    found = list(given)
    for mount in found:
        check_text("--mount", mount)
        parts = mount.split(":")
        if "," in mount or len(parts) > 3 or not all(part.startswith("/") for part in parts[:2]):
            raise ConfigError(
                f"--mount {mount} must be SOURCE[:TARGET[:FLAGS]] with absolute paths and no comma; "
                "give it once a folder"
            )
    if not is_mounted(str(checkout), found):
        found.append(str(checkout))
    return found


def is_mounted(path: str, mounts: Iterable[str]) -> bool:
    """Whether what is written to `path` in a container outlives it."""
    targets = [(*mount.split(":"), "")[1 if ":" in mount else 0] for mount in mounts]
    return any(PurePosixPath(path).is_relative_to(target) for target in targets)
