"""What a bench case leaves behind: figures with the machine, versions, command and day they belong to."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kandinsky_dist.errors import DataError

PACKAGES = ("kandinsky-dist", "torch", "deepspeed", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement.

    Attributes:
        case: name of the bench case, which knows how to render it.
        device: the machine, in words.
        versions: package -> version.
        command: what measured it, to be repeated by others; no local paths.
        date: day of the measurement (UTC, ISO 8601).
        setting: what the rows have in common, for instance the world size.
        rows: measured values, one dictionary a row; numbers with their unit in the name.
    """

    case: str
    device: str
    versions: dict[str, str]
    command: str
    date: str
    setting: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def now(
        cls,
        case: str,
        *,
        device: str,
        command: str,
        setting: dict[str, Any],
        rows: list[dict[str, Any]],
        packages: Sequence[str] = (),
    ) -> "Record":
        """A record of today, on this machine's software; `packages` are named beside the usual ones."""
        return cls(
            case=case,
            device=device,
            versions=installed_versions((*PACKAGES, *packages)),
            command=command,
            date=datetime.now(UTC).date().isoformat(),
            setting=setting,
            rows=rows,
        )

    def save(self, path: Path) -> None:
        """Writes JSON, one row a line, so that two records can be compared by eye."""
        tree = asdict(self)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in tree.pop("rows"))
        head = json.dumps(tree, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', "utf-8")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is no record.
        """
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} is not a bench record ({error}): kandinsky-dist bench writes them"
            ) from error


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages that figures depend on; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device_type: str) -> str:
    """The hardware of that type in this machine: "2 x NVIDIA H200", or "CPU AMD EPYC, 2 cores"."""
    if device_type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU {_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
