"""`bench comm`: what the network between ranks can do, and how much of it a training step waits for.

Collectives by size and type; then steps of one network that reduce gradients beside backward, without
overlap, and not at all. Everything that is compared is measured in turns in the same processes.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kandinsky_dist.bench import comm_picture
from kandinsky_dist.bench.collectives import COLLECTIVES, DTYPES, Exchange
from kandinsky_dist.bench.comm_report import to_markdown
from kandinsky_dist.bench.ranks import run_on_ranks
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.silence import silent
from kandinsky_dist.bench.states import forget_the_past, take_snapshot
from kandinsky_dist.bench.workload import build, random_weights, workload
from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.config.schema import Config, DataConfig, ParallelConfig
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.optional import require
from kandinsky_dist.parallel.base import ModelPlan, Strategy
from kandinsky_dist.parallel.select import engine_precision, select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import Process, joined

# zero3 last: deepspeed.zero.Init replaces torch's linear function for the rest of the process.
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SMALLEST_BYTES = 4 * 2**10
LARGEST_MIB = {"cuda": 256, "cpu": 16}
CALL_BYTES = 2**20
"""A repeat makes as many calls as it takes to move so much, and at most MAX_CALLS."""
MAX_CALLS = 20


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        size: of the prior, whose steps are timed.
        strategies: of `STRATEGIES`, in that order.
        max_mib: largest message; None: 256 on GPUs, 16 on CPUs.
        micro_batch_size: samples a step and rank.
        buckets_mib: values of parallel.bucket_mib; the first is that of steps without overlap.
        num_repeats: of everything; medians count.
    """

    size: Size
    strategies: tuple[str, ...]
    max_mib: int | None
    micro_batch_size: int
    buckets_mib: tuple[float, ...]
    num_repeats: int


def run(out: Path, plan: Plan, *, world_size: int | None) -> None:
    """Measures; writes OUT/comm.json, comm.md and comm.png, and prints the page.

    Under a launcher it measures between the ranks that are there, else between processes that it starts.

    Raises:
        ConfigError: a package is missing, the ranks are fewer than 2, or not those of the launcher.
    """
    comm_picture.require_matplotlib()
    if any(name.startswith("zero") for name in plan.strategies) and find_spec("deepspeed") is None:
        require("deepspeed", extra="deepspeed", why=f"bench comm --strategy {' '.join(plan.strategies)}")
    if min(plan.num_repeats, plan.micro_batch_size, plan.max_mib or 1) < 1 or min(plan.buckets_mib) <= 0:
        raise ConfigError("--repeats, --micro-batch-size, --max-mib and --bucket-mib must be above 0")
    ranks = read_ranks(os.environ)
    is_launched = ranks.world_size > 1
    if is_launched and world_size not in (None, ranks.world_size):
        raise ConfigError(
            f"--world-size {world_size} but the launcher started {ranks.world_size}: leave it out"
        )
    num_ranks = ranks.world_size if is_launched else world_size or max(2, torch.cuda.device_count())
    if num_ranks < 2:
        raise ConfigError(f"--world-size {num_ranks} must be 2 or more: one rank has nobody to talk to")
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)  # that it cannot be written is better known before than after
    found = measure(plan) if is_launched else run_on_ranks(measure, num_ranks, plan)[0]
    if ranks.rank == 0:
        _write(out, plan, num_ranks, **found)


def _write(
    out: Path, plan: Plan, world_size: int, device: str, setting: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    options = f"--size {plan.size} --strategy {' '.join(plan.strategies)} --repeats {plan.num_repeats}"
    if plan.max_mib is not None:
        options += f" --max-mib {plan.max_mib}"
    record = Record.now(
        "comm",
        device=device,
        command=(
            f"kandinsky-dist bench comm OUT {options} --micro-batch-size {plan.micro_batch_size} "
            f"--bucket-mib {' '.join(f'{size:g}' for size in plan.buckets_mib)} --world-size {world_size}"
        ),
        setting={**asdict(plan), **setting, "world_size": world_size},
        rows=rows,
    )
    record.save(out / "comm.json")
    (out / "comm.md").write_text(to_markdown(record), "utf-8")
    (out / "comm.png").write_bytes(comm_picture.draw(record))
    print(to_markdown(record), end="")


def measure(plan: Plan) -> dict[str, Any]:
    """What each rank runs: device, setting and rows, the slowest rank's time in each repeat."""
    with joined() as process:
        rows = _collective_rows(plan, process)
        setting: dict[str, Any] = {
            "backend": "nccl" if process.device.type == "cuda" else "gloo",
            "num_nodes": len(set(agree.gather(os.uname().nodename))),
            "threads_per_rank": torch.get_num_threads(),
        }
        for strategy in plan.strategies:
            step_rows, more = _step_rows(plan, strategy, process)
            rows += step_rows
            setting |= more
        return {"device": device_name(process.device.type), "setting": setting, "rows": rows}


def _collective_rows(plan: Plan, process: Process) -> list[dict[str, Any]]:
    largest_bytes = (plan.max_mib or LARGEST_MIB[process.device.type]) * 2**20
    sizes = [SMALLEST_BYTES]
    while sizes[-1] * 4 <= largest_bytes:
        sizes.append(sizes[-1] * 4)
    cases = [
        {"collective": name, "dtype": dtype, "num_bytes": num_bytes}
        for name in COLLECTIVES
        for dtype in DTYPES
        for num_bytes in sizes
    ]
    exchange = Exchange(process, max(sizes))
    calls = [partial(_call_often, exchange, case) for case in cases]
    seconds = [
        [value / _num_calls(case) for value in times]
        for case, times in zip(cases, _in_turns(calls, plan.num_repeats, process), strict=True)
    ]
    return [
        {"kind": "collective", **case, "seconds": times} for case, times in zip(cases, seconds, strict=True)
    ]


def _num_calls(case: dict[str, Any]) -> int:
    return max(1, min(MAX_CALLS, CALL_BYTES // case["num_bytes"]))


def _call_often(exchange: Exchange, case: dict[str, Any]) -> None:
    for _ in range(_num_calls(case)):
        exchange.call(**case)


def _step_rows(plan: Plan, name: str, process: Process) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A strategy's steps with overlap by bucket, without it and without communication; facts of the model."""
    torch.manual_seed(0)
    objective, prepared = workload("prior", plan.size, process, num_samples=plan.micro_batch_size)
    forget_the_past()
    first = plan.buckets_mib[0]
    engines = {size: _Engine(plan, name, process, overlap=True, bucket_mib=size) for size in plan.buckets_mib}
    waiting = _Engine(plan, name, process, overlap=False, bucket_mib=first)

    def step(
        engine: _Engine,
        *,
        is_last: bool = True,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        with inside():
            with engine.strategy.accumulate(is_last=is_last):
                engine.strategy.backward(objective.losses(engine.model, prepared).mean())
            engine.strategy.step(learning_rate=0.0)  # ranks whose gradients differ keep the same weights

    cases: dict[tuple[str, float | None], Callable[[], None]] = {
        ("overlapped", size): partial(step, engine) for size, engine in engines.items()
    }
    cases["not overlapped", first] = partial(step, waiting)
    if name == "ddp":
        cases["none", None] = partial(step, engines[first], is_last=False)
    elif name != "zero3":  # which computes with what it gathers
        cases["none", None] = partial(step, engines[first], inside=silent)
    times = _in_turns(list(cases.values()), plan.num_repeats, process)
    rows = [
        {
            "kind": "step",
            "strategy": name,
            "communication": communication,
            "bucket_mib": size,
            "seconds": seconds,
        }
        for (communication, size), seconds in zip(cases, times, strict=True)
    ]
    facts = {
        "precision": str(engine_precision(waiting.config, process.device)).removeprefix("torch."),
        "num_parameters": waiting.num_parameters,
    }
    for engine in (*engines.values(), waiting):
        engine.release(process.device)
    return rows, facts


class _Engine:
    """One strategy around its own copy of the network."""

    def __init__(self, plan: Plan, name: str, process: Process, *, overlap: bool, bucket_mib: float) -> None:
        self.config = Config(
            stage="prior",
            data=DataConfig(
                global_batch_size=plan.micro_batch_size * process.world_size,
                micro_batch_size=plan.micro_batch_size,
            ),
            parallel=ParallelConfig(strategy=name, overlap=overlap, bucket_mib=bucket_mib),  # type: ignore[arg-type]
        )
        structure = partial(build, "prior", plan.size)
        self.strategy: Strategy = select(self.config, process, num_micro=1)
        self.model = self.strategy.prepare(
            ModelPlan(
                build=structure, state_dict=partial(random_weights, structure), optimizer=self._optimizer
            )
        )
        trained = [item for item in self.model.parameters() if item.requires_grad]
        self.num_parameters = sum(getattr(item, "ds_numel", item.numel()) for item in trained)

    def _optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
        self._adamw = build_adamw(named, self.config.optim)
        return self._adamw

    def release(self, device: torch.device) -> None:
        """Gives the memory back, for the next strategy; DeepSpeed 0.19 refers to an engine for ever."""
        leftovers = take_snapshot(self.model, self._adamw, device)
        getattr(self.model, "destroy", lambda: None)()
        leftovers.release()
        gc.collect()


def _in_turns(calls: Sequence[Callable[[], None]], num_repeats: int, process: Process) -> list[list[float]]:
    """Seconds of each call in each repeat, of the rank that took longest, after two rounds that do not count.

    All calls are made once before any is made again, so that a machine that slows down does so for all.
    """
    mine: list[list[float]] = [[] for _ in calls]
    for number in range(-2, num_repeats):
        for call, times in zip(calls, mine, strict=True):
            dist.barrier()
            _finish(process.device)
            begin = time.perf_counter()
            call()
            _finish(process.device)
            if number >= 0:
                times.append(time.perf_counter() - begin)
    by_rank = agree.gather(mine)
    return [[max(values) for values in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
