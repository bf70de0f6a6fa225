"""One node's look at itself: lines for people, and facts that nodes are compared by."""

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from kandinsky_dist import __version__
from kandinsky_dist.config.resolve import run_dir
from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import ConfigError, KandinskyError, explained

Found = TypeVar("Found")

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "deepspeed",
    "accelerate",
    "webdataset",
    "xformers",
    "tensorboard",
    "safetensors",
    "numpy",
)
"""Whose versions must be equal on all nodes: they decide what is computed, read and written."""
NOT_INSTALLED = "not installed"
PRODUCT_SIZE = 1024
ECC_QUERY = (
    "nvidia-smi",
    "--query-gpu=ecc.errors.uncorrected.volatile.total",
    "--format=csv,noheader,nounits",
)


@dataclass(frozen=True)
class Report:
    """What a node found.

    Attributes:
        node: its name.
        versions: of the interpreter, the project, `PACKAGES`, CUDA and the GPUs' driver.
        gpus: name and whole GiB of memory of each GPU.
        clock_ahead_seconds: of its clock, against the clock of the file system that holds the run folder;
            None where that cannot be written.
        problems: a line each, with the exit code it stands for.
    """

    node: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    clock_ahead_seconds: float | None = None
    problems: tuple[tuple[str, int], ...] = field(default=())

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of_line(cls, line: str) -> "Report | None":
        """The report that a line holds, None for any other line."""
        try:
            found = json.loads(line)
            return cls(
                node=found["node"],
                versions=found["versions"],
                gpus=tuple(found["gpus"]),
                clock_ahead_seconds=found["clock_ahead_seconds"],
                problems=tuple((text, code) for text, code in found["problems"]),
            )
        except (ValueError, KeyError, TypeError):
            return None


def node_name(environ: Mapping[str, str]) -> str:
    """The name that the scheduler calls this node by, else that of the host."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def examine(config: Config, environ: Mapping[str, str]) -> Report:
    """Looks at this node: packages, GPUs, the run folder, the models' folders, its share of the shards.

    Args:
        environ: of a task that Slurm started on the node, or of any process of a machine alone.
    """
    problems: list[tuple[str, int]] = []

    def attempt(check: Callable[[], Found]) -> Found | None:
        try:
            return check()
        except Exception as error:  # whatever it is, it belongs to this node and is told with its name
            known = explained(error)
            problems.append(known or (f"{type(error).__name__}: {error}", KandinskyError.exit_code))
            return None

    clock = attempt(lambda: _clock_ahead(run_dir(config), node_name(environ)))
    attempt(lambda: _read_inputs(config, environ))
    gpus = attempt(lambda: _gpus(environ)) or ()
    return Report(
        node=node_name(environ),
        versions=attempt(_versions) or {},
        gpus=gpus,
        clock_ahead_seconds=clock,
        problems=tuple(problems),
    )


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "kandinsky_dist": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = NOT_INSTALLED
    found["CUDA"] = torch.version.cuda or "none"
    driver = Path("/sys/module/nvidia/version")
    found["driver"] = driver.read_text().strip() if driver.exists() else "none"
    return found


def _clock_ahead(folder: Path, node: str) -> float:
    """Writes where the run folder is or will be, reads it back, and compares the file system's clock."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    probe = place / f".preflight-{node}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(node.encode())
            file.flush()
            os.fsync(file.fileno())
        now = time.time()
        if probe.read_bytes() != node.encode():
            raise ConfigError(
                f"run.dir={folder}: what is written there does not come back; use another folder"
            )
        return now - probe.stat().st_mtime
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"run.dir={folder} cannot be written: {reason}; mount it or use another one"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _read_inputs(config: Config, environ: Mapping[str, str]) -> None:
    """The models' folders, every manifest, and this node's share of the shards."""
    from kandinsky_dist.train import corpora
    from kandinsky_dist.train.build import Folders

    Folders.of(config)
    index, count = int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_NNODES", "1"))
    corpora.check_corpora(config, slice(index, None, count))


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Name and memory of each GPU; each has computed a product that is known."""
    import torch

    count = torch.cuda.device_count()
    promised = environ.get("SLURM_GPUS_ON_NODE", "")
    if promised.isdigit() and torch.version.cuda and count != int(promised):
        raise ConfigError(
            f"{count} GPUs are visible, the job has {promised} here; see nvidia-smi on that node"
        )
    found = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        ones = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=f"cuda:{index}", dtype=torch.bfloat16)
        if not bool(((ones @ ones) == PRODUCT_SIZE).all()):
            raise ConfigError(f"GPU {index} computes a wrong product; take the node out of service")
        found.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    if count:
        _refuse_memory_errors()
    return tuple(found)


def _refuse_memory_errors() -> None:
    try:
        said = subprocess.run(ECC_QUERY, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return  # no such program on this node, or it hangs as it does beside a driver that is being updated
    for index, count in enumerate(said):
        if count.isdigit() and int(count):
            raise ConfigError(f"GPU {index} has had {count} uncorrected memory errors; reset or replace it")
