"""Real processes of one machine, for a bench case to measure in."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.runtime.deadline import arm

Result = TypeVar("Result")


def run_on_ranks(function: Callable[..., Result], world_size: int, *arguments: Any) -> list[Result]:
    """Calls a function in `world_size` new processes and returns each one's result, by rank.

    torch's own launcher starts them, on a free port; where one fails, all end. With a GPU for each rank they
    see the GPUs, with fewer they run on CPUs.

    Args:
        function: of a module's top level; joins the process group by itself.
        arguments: its arguments; they and the results travel by pickle between our own processes.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size} must be 1 or more")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="bench",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    with environment(machine_settings(world_size)):  # the new processes inherit it
        results = elastic_launch(launch, _run_and_end)(function, *arguments)
    return [results[rank] for rank in range(world_size)]


def _run_and_end(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function`; after it, the process ends in time even if the interpreter hangs at its end."""
    result = function(*arguments)
    arm(0)
    return result


def machine_settings(world_size: int, *, is_on_cpu: bool = False) -> dict[str, str]:
    """Environment that divides this machine's cores, and hides GPUs that are too few for the ranks.

    Args:
        world_size: ranks.
        is_on_cpu: hides them anyway.
    """
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if is_on_cpu or torch.cuda.device_count() < world_size:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
