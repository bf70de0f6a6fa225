"""Whose folder it is, judged by the files in it."""

from enum import Enum
from pathlib import Path

from kandinsky_dist.checkpoint.layout import COMMIT, checkpoints_of

LATEST_UNIVERSAL = "latest_universal"
"""File that names the universal checkpoint beside it."""

_PARTITIONS = "*_optim_states.pt"
NETWORKS = ("prior", "unet")
"""What the diffusers scripts name the folder of the network that they train."""


class Kind(Enum):
    """Who saved a folder; the value says it to people."""

    OWN = "a run of kandinsky-dist"
    UNIVERSAL = "a universal checkpoint of DeepSpeed"
    PARTITIONED = "a checkpoint of DeepSpeed in the partitions of its world size"
    SCRIPT = "a checkpoint of the diffusers scripts"
    SCRIPT_RUN = "an output folder of the diffusers scripts"
    PIPELINE = "weights in diffusers' layout"


CONVERTIBLE = (Kind.UNIVERSAL, Kind.PARTITIONED, Kind.SCRIPT, Kind.SCRIPT_RUN)
"""What `checkpoint convert` makes one of ours of, or says how."""


def saved_by(folder: Path) -> Kind | None:
    """Who saved a folder, None where that cannot be seen."""
    if (folder / COMMIT).is_file() or (folder / "checkpoints").is_dir() or checkpoints_of(folder):
        return Kind.OWN
    if (folder / LATEST_UNIVERSAL).is_file() or (folder / "zero").is_dir():
        return Kind.UNIVERSAL
    if partitions_in(folder):
        return Kind.PARTITIONED
    if (folder / "optimizer.bin").is_file():
        return Kind.SCRIPT
    if any((path / "optimizer.bin").is_file() or partitions_in(path) for path in folder.glob("checkpoint-*")):
        return Kind.SCRIPT_RUN
    if any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        return Kind.PIPELINE
    if any((folder / name / "config.json").is_file() for name in NETWORKS):
        return Kind.PIPELINE
    return None


def partitions_in(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files: itself, the one that `latest` names, or where accelerate puts it."""
    candidates = [folder, folder / "pytorch_model"]
    latest = folder / "latest"
    if latest.is_file():
        candidates.append(folder / latest.read_text(errors="replace").strip())
    return next((path for path in candidates if any(path.glob(_PARTITIONS))), None)
