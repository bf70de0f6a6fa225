"""Cases measured in turns: all of them before any again, each in processes of its own."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kandinsky_dist.bench import train_incumbent, train_ours
from kandinsky_dist.bench.teams import CaseFailedError, Team, Turn
from kandinsky_dist.bench.train_case import Case, merged, row_of
from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.errors import ConfigError

COMPILE_STEPS = 8
"""Further steps to warm up where code is compiled: time for batches of every usual text length to come."""

RUNS = {"ours": train_ours.run, "incumbent": train_incumbent.run}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How cases are measured.

    Attributes:
        num_warmup: steps of a case before its first turn, and half as many before each further one.
        num_steps: of a turn of the first case.
        most_times: a faster case makes as many more steps in a turn as it is faster, up to so many times: a
            turn that is over in a moment says more of that moment than of the case.
        num_repeats: turns of each case; their median counts.
        num_alive: cases that hold memory at once, the first one among them; 0: all of a stage.
    """

    num_warmup: int
    num_steps: int
    num_repeats: int
    num_alive: int
    most_times: int = 4


def check_plan(plan: Plan) -> None:
    """Refuses a plan that measures nothing, and a launcher."""
    if min(plan.num_steps, plan.num_repeats) < 1 or min(plan.num_warmup, plan.num_alive) < 0:
        raise ConfigError("--steps and --repeats must be 1 or more, --warmup and --alive 0 or more")
    if read_ranks(os.environ).world_size > 1:
        raise ConfigError("this bench starts its own processes: run it without torchrun, srun or accelerate")


def device_of(world_size: int) -> str:
    """The kind of device that so many ranks get on this machine."""
    return "cuda" if torch.cuda.device_count() >= world_size else "cpu"


def measure(cases: Sequence[Case], plan: Plan, out: Path) -> list[dict[str, Any]]:
    """A row for each case, in their order; the first one is what the others are compared with.

    Where not all may be alive at once, the first one is measured with each group of the others again.
    """
    first, others = cases[0], list(cases[1:])
    size = max(1, plan.num_alive - 1) if plan.num_alive else max(1, len(others))
    groups = [[first, *others[number : number + size]] for number in range(0, max(1, len(others)), size)]
    work = Path(tempfile.mkdtemp(prefix=".train.", dir=out))
    found: dict[str, _Found] = {case.name: _Found() for case in cases}
    bar = tqdm(desc=f"bench {first.stage}", unit="turn", disable=None)
    try:
        for number, group in enumerate(groups):
            _measure_group(group, plan, work / str(number), found, bar)
    finally:
        bar.close()
        shutil.rmtree(work, ignore_errors=True)
    rows = []
    for case in cases:
        mine = found[case.name]
        row = row_of(case, mine.facts, mine.repeats)
        row |= {f"{kind}_seconds": seconds for kind, seconds in mine.without_communication.items()}
        rows.append({**row, "note": mine.note})
    return rows


class _Found:
    """What is known of a case so far."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.repeats: list[dict[str, Any]] = []
        self.without_communication: dict[str, list[float]] = {}
        self.note = ""


def _measure_group(
    group: Sequence[Case], plan: Plan, folder: Path, found: Mapping[str, _Found], bar: Any
) -> None:
    teams: dict[str, Team] = {}
    step_seconds: dict[str, float] = {}

    def fail(name: str, error: CaseFailedError) -> None:
        found[name].note = str(error)
        teams.pop(name).close()

    def take(case: Case, turn: Turn) -> dict[str, Any] | None:
        bar.update()
        try:
            return merged(teams[case.name].take(turn), turn.num_steps)
        except CaseFailedError as error:
            fail(case.name, error)
            return None

    try:
        for number, case in enumerate(group):
            teams[case.name] = Team(
                RUNS[case.way], case, case.world_size, folder / str(number), is_on_cpu=case.is_on_cpu
            )
        for name in [case.name for case in group]:
            try:
                found[name].facts = teams[name].wait_ready()
            except CaseFailedError as error:
                fail(name, error)
        for case in group:
            if case.name in teams:
                more = COMPILE_STEPS if case.way == "ours" and case.config.parallel.compile else 0
                if result := take(case, Turn(plan.num_warmup + more, 1)):
                    step_seconds[case.name] = result["step_seconds"]
        for _ in range(plan.num_repeats):
            baseline_seconds = None
            for case in group:
                result = None
                if case.name in teams:
                    faster = step_seconds.get(group[0].name, 0.0) / step_seconds[case.name]
                    num_steps = plan.num_steps * min(plan.most_times, max(1, round(faster)))
                    result = take(case, Turn(plan.num_warmup // 2, num_steps))
                if result is None:
                    continue
                if case is group[0]:
                    baseline_seconds = result["step_seconds"]
                found[case.name].repeats.append({**result, "baseline_seconds": baseline_seconds})
        # Last, for ranks that have not exchanged their gradients have different moments from here on.
        for _ in range(plan.num_repeats):
            for case in group:
                if case.world_size > 1 and case.way == "ours" and case.config.parallel.strategy == "ddp":
                    _without_communication(case, plan, found[case.name], teams, take)
    finally:
        for team in teams.values():
            team.close()


def _without_communication(
    case: Case, plan: Plan, found: _Found, teams: Mapping[str, Team], take: Any
) -> None:
    for kind in ("reduced", "silent"):
        if case.name in teams and (result := take(case, Turn(1, plan.num_steps, kind))):
            found.without_communication.setdefault(kind, []).append(result["step_seconds"])
