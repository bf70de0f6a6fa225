"""Real processes of one machine, for a bench case to measure in."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kandinsky_dist.errors import ConfigError

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
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if torch.cuda.device_count() < world_size:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # the new processes inherit it
    try:
        results = elastic_launch(launch, function)(*arguments)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return [results[rank] for rank in range(world_size)]
