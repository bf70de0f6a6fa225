"""`bench scaling`: samples a second by the number of ranks of this machine.

Weak: each rank has the same micro-batch, the global batch grows. Strong: the global batch stays, ranks share
its micro-batches. All numbers of ranks of one strategy take turns.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kandinsky_dist.bench import scaling_report, train_picture
from kandinsky_dist.bench.ranks import environment, machine_settings
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.train import Inputs, checked, make_inputs, save
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.bench.train_measure import Plan, check_plan, device_of, measure
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.errors import ConfigError

MODES = ("weak", "strong")


def run(
    out: Path,
    plan: Plan,
    inputs: Inputs,
    *,
    stages: Sequence[Stage],
    strategies: Sequence[str],
    modes: Sequence[str],
    ranks: Sequence[int],
) -> Record:
    """Measures; writes OUT/scaling.json, scaling.md and scaling.png, and prints the page.

    Args:
        out: folder; networks and corpus are made in it too, and found there by the next call.
        plan: how.
        inputs: what.
        stages: networks.
        strategies: engines.
        modes: of `MODES`.
        ranks: numbers of ranks; none: `usual_ranks`. With fewer GPUs than the most ranks all are on CPUs.

    Raises:
        ConfigError: a case cannot work as given.
    """
    train_picture.require_matplotlib()
    check_plan(plan)
    begin = time.monotonic()
    ranks = sorted(set(ranks or usual_ranks()))
    if ranks[0] < 1:
        raise ConfigError(f"--ranks {' '.join(map(str, ranks))} must be 1 or more each")
    if "data.global_batch_size" in inputs.settings:
        raise ConfigError(
            "data.global_batch_size follows from the number of ranks here: set data.micro_batch_size"
        )
    device = device_of(ranks[-1])
    common = make_inputs(out, inputs, stages, 1)
    groups = [
        [_case(stage, strategy, mode, number, ranks[-1], common[stage], device) for number in ranks]
        for stage in stages
        for strategy in strategies
        for mode in modes
    ]
    groups = [checked(group, out, inputs) for group in groups]
    with environment(machine_settings(ranks[-1])):  # a rank alone has no more cores than one of many
        rows = [row for group in groups for row in measure(group, plan, out)]
    words = [
        f"--size {inputs.size} --stage {' '.join(stages)} --strategy {' '.join(strategies)}",
        f"--mode {' '.join(modes)} --ranks {' '.join(map(str, ranks))}",
    ]
    setting = {
        "world_size": ranks[-1],
        "shares_cores": device == "cpu" and ranks[-1] > (os.cpu_count() or 1),
        "seconds": time.monotonic() - begin,
    }
    return save(
        out, "scaling", plan, inputs, rows, words, setting, scaling_report.to_markdown, scaling_report.draw
    )


def usual_ranks() -> list[int]:
    """1, 2, 4 ... up to this machine's GPUs; 1 and 2 where there are none."""
    return [number for number in (1, 2, 4, 8, 16) if number <= (torch.cuda.device_count() or 2)]


def _case(
    stage: Stage,
    strategy: str,
    mode: str,
    num_ranks: int,
    most: int,
    common: Mapping[str, str],
    device: str,
) -> Case:
    micro = int(common["data.micro_batch_size"])
    return Case(
        name=f"{strategy}, {mode}, {num_ranks}",
        stage=stage,
        common=common,
        settings={
            "parallel.strategy": strategy,
            "data.global_batch_size": str(micro * (num_ranks if mode == "weak" else most)),
        },
        world_size=num_ranks,
        is_on_cpu=device == "cpu",
        more={"mode": mode},
    )
