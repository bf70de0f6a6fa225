"""Asks every node of a Slurm job, or this machine, for its report."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kandinsky_dist.config.schema import Config
from kandinsky_dist.preflight.network import DEFAULT_PORT, Links
from kandinsky_dist.preflight.node import Report, examine
from kandinsky_dist.runtime.slurm import run_slurm

_LABELLED = re.compile(r"^\s*(\d+): ?(.*)$")


@dataclass(frozen=True)
class Gathered:
    """The nodes of the job, the reports that came, and the last words on stderr of each node."""

    nodes: tuple[str, ...]
    reports: tuple[Report, ...]
    said: Mapping[str, str]


def gather(config: Config, words: Sequence[str], environ: Mapping[str, str], *, patience: float) -> Gathered:
    """One report a node.

    Args:
        words: the arguments after `kandinsky-dist preflight`, for the tasks on the nodes.
        environ: inside a Slurm allocation all of its nodes are asked, at the same time.
        patience: seconds after which a node that has not answered is not waited for.
    """
    if "SLURM_JOB_NUM_NODES" not in environ:
        report = examine(config, environ)
        return Gathered((report.node,), (report,), {})
    nodes = tuple(
        run_slurm(["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]], timeout=60).split()
    )
    lines, said = _ask(nodes, [*words, "--this-node"], environ, patience)
    reports = map(Report.of_line, lines)
    return Gathered(nodes, tuple(report for report in reports if report is not None), said)


def gather_links(
    nodes: tuple[str, ...], words: Sequence[str], environ: Mapping[str, str], *, patience: float
) -> tuple[Links, ...]:
    """What the nodes, all of which reported, measure between each other; see `gather`."""
    meeting = environ.get("RENDEZVOUS", f"{nodes[0]}:{DEFAULT_PORT}")
    lines, _ = _ask(nodes, [*words, "--links"], {**environ, "RENDEZVOUS": meeting}, patience)
    found = map(Links.of_line, lines)
    return tuple(links for links in found if links is not None)


def _ask(
    nodes: tuple[str, ...], words: Sequence[str], environ: Mapping[str, str], patience: float
) -> tuple[list[str], dict[str, str]]:
    """Lines that `kandinsky-dist preflight` prints on the nodes, and the last words on stderr of each."""
    task = ["srun", "--label", "--ntasks-per-node=1", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}"]
    task += ["--kill-on-bad-exit=0", "--wait=0", "--overlap"]
    task += [sys.executable, "-m", "kandinsky_dist", "preflight", *words]
    process = subprocess.Popen(
        task, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(environ)
    )
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    # Without other orders srun numbers tasks in the order of the nodes.
    said = {nodes[task]: text for task, text in _labelled(err) if task < len(nodes) and text.strip()}
    return [text for _, text in _labelled(out)], said


def _labelled(text: str) -> list[tuple[int, str]]:
    matches = (_LABELLED.match(line) for line in text.splitlines())
    return [(int(match[1]), match[2]) for match in matches if match]
