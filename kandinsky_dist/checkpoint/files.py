"""The files of a run's checkpoints: which there are, and whether they are what was written. No torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

COMMIT = "COMMIT"
STATE = "state.json"
CONFIG = "config.yaml"
TEMPORARY = ".tmp"
"""Ends the name of a folder that is being written."""


def folder_name(step: int) -> str:
    """Name of a step's checkpoint folder."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named by."""
    return int(checkpoint.name[5:])


def checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, whole or not."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def promised_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What COMMIT says: file name -> what `checksum` found when it was written.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged.
    """
    try:
        found = json.loads((folder / COMMIT).read_text())["files"]
        return {name: {"bytes": item["bytes"], "sha256": item["sha256"]} for name, item in found.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / COMMIT} lacks {error}") from error


def damage(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint, or None if it is one. Reads every byte."""
    try:
        promised = promised_files(folder)
    except FileNotFoundError:
        return f"no {COMMIT}: it was never finished"
    except (OSError, ValueError):
        return f"{COMMIT} is unreadable"
    # The reader takes every rank's file that is there, so each must have been promised.
    for name in sorted({STATE, CONFIG, *(path.name for path in folder.glob("rank_*.safetensors"))}):
        if name not in promised:
            return f"{name} is not in {COMMIT}"
    for name, expected in promised.items():
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found["bytes"] != expected["bytes"]:
            return f"{name} has {found['bytes']} bytes, {expected['bytes']} were written"
        if found != expected:
            return f"{name}: its bytes changed since they were written"
    return None
