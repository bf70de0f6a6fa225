"""From the reports of all nodes to what is wrong, a line for each. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.preflight.network import Links
from kandinsky_dist.preflight.node import Report

MAX_SKEW_SECONDS = 30.0
"""Clocks that differ by more than this make heartbeats, fences and times left wrong."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a node, and the exit code that it stands for."""

    node: str
    text: str
    exit_code: int = ConfigError.exit_code

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def problems_of(nodes: Sequence[str], reports: Sequence[Report], said: Mapping[str, str]) -> list[Problem]:
    """Compares what the nodes found.

    Args:
        nodes: names of all nodes of the job.
        reports: of those that reported, as they came.
        said: the last words on stderr of each node that said something; for those without a report.

    Returns:
        One or more problems of each node that cannot take part, in the order of `nodes`.
    """
    by_node = {report.node: report for report in reports}
    reports = [by_node[node] for node in nodes if node in by_node]
    versions = _common_versions(reports)
    clocks = [report.clock_ahead_seconds for report in reports if report.clock_ahead_seconds is not None]
    clock = median_low(clocks) if clocks else 0.0
    gpus = _most_common([report.gpus for report in reports if not report.problems])
    found = []
    for node in nodes:
        if node not in by_node:
            last = said.get(node, "it said nothing")
            found.append(Problem(node, f"did not report ({last}); repair it, or leave it out with --exclude"))
            continue
        report = by_node[node]
        found += [Problem(node, text, exit_code) for text, exit_code in report.problems]
        found += [Problem(node, text) for text in _differences(report, versions, gpus, clock)]
    return found


def slow_links(nodes: Sequence[str], links: Sequence[Links], floor: float) -> list[Problem]:
    """Whoever keeps the all-reduce below a floor in GB/s; an empty list where nobody does."""
    by_node = {link.node: link for link in links}
    missing = [node for node in nodes if node not in by_node]
    if missing:
        text = "did not measure its network within the patience; see its log, or leave it out with --exclude"
        return [Problem(node, text) for node in missing]
    reached = min(link.all_reduce for link in links)
    if reached >= floor:
        return []
    rule = f"KANDINSKY_MIN_GB_S={floor:g}"
    remedy = "repair its link, or leave it out with --exclude"
    slow = [
        Problem(node, f"exchanges {max(by_node[node].pairs):.3g} GB/s at most, {rule}; {remedy}")
        for node in nodes
        if max(by_node[node].pairs) < floor
    ]
    everywhere = Problem(
        nodes[0],
        f"all-reduce over {len(nodes)} nodes reaches {reached:.3g} GB/s, {rule}, though no node is slow with "
        "its neighbours; look at the switches between them",
    )
    return slow or [everywhere]


def _differences(
    report: Report, versions: Mapping[str, str], gpus: tuple[str, ...] | None, clock: float
) -> Iterator[str]:
    """Where a node is not like the others."""
    for name, value in report.versions.items():
        if value != versions[name]:
            yield f"{name} is {value}, on the other nodes {versions[name]}; install the same one"
    if gpus is not None and report.gpus != gpus and not report.problems:
        yield f"its GPUs are {_listed(report.gpus)}, on the other nodes {_listed(gpus)}; ask for nodes alike"
    ahead = report.clock_ahead_seconds
    if ahead is not None and abs(ahead - clock) > MAX_SKEW_SECONDS:
        yield f"its clock is {ahead - clock:+.0f} s from the other nodes'; synchronise it"


def _common_versions(reports: Sequence[Report]) -> dict[str, str]:
    """Package -> the version that most nodes have; of equally many that of the first node."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for name, value in report.versions.items():
            found.setdefault(name, []).append(value)
    return {name: Counter(values).most_common(1)[0][0] for name, values in found.items()}


def _most_common(gpus: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    return Counter(gpus).most_common(1)[0][0] if gpus else None


def _listed(gpus: Sequence[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(gpus).items()) or "none"
