"""A job's whole file, from what was asked for. Pure: the same job is the same text."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kandinsky_dist.config.schema import Stage
from kandinsky_dist.submit.checkout import SCRIPT

DEFAULT_OUTPUT = "%x-%j.log"
SECONDS_TO_SAVE = 180


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is submitted.

    Attributes:
        checkout: folder with slurm/train.sh.
        command: what its processes run.
        config: recipe or file.
        words: settings and options that follow the stage, as on the command line.
        tasks: "node": one task a node, which starts its ranks; "rank": one task a rank.
        name: of the job.
        output: of the log, with sbatch's patterns.
        sbatch: more long options of sbatch, which win over those above.
        srun: long options of the srun that starts the tasks.
        environment: variables that the job has beside those that it is submitted with.
        venv: virtual environment, or None for the active one or the checkout's.
    """

    checkout: Path
    command: Literal["train", "precompute"]
    stage: Stage
    config: str
    words: Sequence[str] = ()
    nodes: int = 1
    gpus_per_node: int = 8
    tasks: Literal["node", "rank"] = "node"
    name: str
    output: str = DEFAULT_OUTPUT
    sbatch: Sequence[str] = ()
    srun: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: str | None = None


def render(job: Job) -> str:
    """The file for sbatch, which `sbatch FILE` takes too."""
    does = "Trains" if job.command == "train" else "Precomputes for"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {sbatch_quote(option)}" for option in _header(job)),
        f"# {does} the {job.stage} on {job.nodes} x {job.gpus_per_node} GPUs. Made by kandinsky-dist submit.",
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()),
        # The package that has checked the settings is the one that runs.
        f"export PYTHONPATH={shlex.quote(str(job.checkout))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    if job.venv is not None:
        lines += [
            f"export VIRTUAL_ENV={shlex.quote(job.venv)}",
            "export PATH=$VIRTUAL_ENV/bin:$PATH",
        ]
    lines += [
        f"export KANDINSKY_COMMAND={job.command}",
        f"export KANDINSKY_CONFIG={shlex.quote(job.config)}",
        f"export KANDINSKY_TASKS={job.tasks}",
        f"export KANDINSKY_SRUN={shlex.quote(shlex.join(job.srun))}",
        f"export NPROC_PER_NODE={job.gpus_per_node}",
        f"exec {shlex.join([str(job.checkout / SCRIPT), job.stage, *job.words])}",
    ]
    return "\n".join(lines) + "\n"


def sbatch_quote(word: str) -> str:
    """A word as sbatch reads it from a file.

    Not as a shell does: a backslash escapes between quotes of either kind, but no space outside them.
    """
    if re.fullmatch(r"[\w@%+=:,./-]+", word):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _header(job: Job) -> Iterator[str]:
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.gpus_per_node if job.tasks == 'rank' else 1}"
    yield f"--gpus-per-node={job.gpus_per_node}"
    yield f"--output={job.output}"
    yield "--open-mode=append"
    yield "--requeue"
    # To the batch shell, which passes it on: the ranks save themselves.
    yield f"--signal=B:USR1@{SECONDS_TO_SAVE}"
    yield from job.sbatch
