"""`bench memory`: bytes of model states a rank under each strategy, beside the textbook's formulas.

What is counted is alive at three moments of a step with two micro-batches.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky_dist.bench.memory_report import to_markdown
from kandinsky_dist.bench.ranks import run_on_ranks
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.states import CLASSES, allocated_bytes, forget_the_past, take_snapshot
from kandinsky_dist.bench.workload import build, random_weights, workload
from kandinsky_dist.config.schema import STAGES, Config, DataConfig, ParallelConfig, Stage
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.optional import require
from kandinsky_dist.parallel.base import ModelPlan
from kandinsky_dist.parallel.select import select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.heap import give_back_freed_memory
from kandinsky_dist.runtime.process import Process, joined

# zero3 last: deepspeed.zero.Init replaces torch's linear function for the rest of the process.
STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16")
NUM_MICRO = 2
BUCKET_MIB = 4.0
"""Small: buckets do not grow with the model, and on a small model the usual 25 MiB would be what one sees."""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    stage: Stage
    size: Size
    strategy: Any
    precision: Any


def run(out: Path, *, size: Size, stages: Sequence[Stage], world_size: int) -> None:
    """Measures every strategy and precision; writes OUT/memory.json and OUT/memory.md, and prints that."""
    if find_spec("deepspeed") is None:  # importing it here would only cost time
        require("deepspeed", extra="deepspeed", why="bench memory")
    cases = [
        Case(stage, size, strategy, precision)
        for strategy in STRATEGIES
        for stage in stages
        for precision in PRECISIONS
    ]
    out.mkdir(parents=True, exist_ok=True)  # that it cannot be written is better known before than after
    rows, device = measure(cases, world_size)
    chosen = "" if set(stages) == set(STAGES) else f" --stage {' '.join(stages)}"
    record = Record.now(
        "memory",
        device=device,
        command=f"kandinsky-dist bench memory OUT --size {size}{chosen} --world-size {world_size}",
        setting={"size": size, "world_size": world_size, "bucket_mib": BUCKET_MIB, "num_micro": NUM_MICRO},
        rows=sorted(rows, key=lambda row: list(stages).index(row["stage"])),
    )
    record.save(out / "memory.json")
    (out / "memory.md").write_text(to_markdown(record), "utf-8")
    print(to_markdown(record), end="")


def measure(cases: Sequence[Case], world_size: int) -> tuple[list[dict[str, Any]], str]:
    """Measures cases one after another in `world_size` new processes.

    Returns:
        A row for each case, moment and rank, and the hardware in words.
    """
    return run_on_ranks(_measure_all, world_size, cases)[0]


def _measure_all(cases: Sequence[Case]) -> tuple[list[dict[str, Any]], str]:
    """What each rank runs; all ranks' rows on every rank."""
    rows = []
    with joined() as process:
        give_back_freed_memory()
        # The first case in a process also loads libraries, which its figure of the process would contain.
        _measure(replace(cases[0], size="tiny"), process)
        for case in cases:
            rows += [row for rows_of_rank in agree.gather(_measure(case, process)) for row in rows_of_rank]
        return rows, device_name(process.device.type)


def _measure(case: Case, process: Process) -> list[dict[str, Any]]:
    """This rank's rows of one case. Collective: call on every rank."""
    config = Config(
        stage=case.stage,
        data=DataConfig(global_batch_size=NUM_MICRO * process.world_size, micro_batch_size=1),
        parallel=ParallelConfig(strategy=case.strategy, precision=case.precision, bucket_mib=BUCKET_MIB),
    )
    torch.manual_seed(0)
    # Activations are not counted, and bf16 is slow on a CPU: the shortest text will do.
    objective, prepared = workload(case.stage, case.size, process, num_tokens=1)
    made: list[torch.optim.AdamW] = []

    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
        made.append(build_adamw(named, config.optim))
        return made[0]

    strategy = select(config, process, num_micro=NUM_MICRO)
    structure = partial(build, case.stage, case.size)
    forget_the_past()
    before = allocated_bytes(process.device)
    model = strategy.prepare(
        ModelPlan(build=structure, state_dict=partial(random_weights, structure), optimizer=optimizer)
    )
    num_parameters = sum(
        getattr(item, "ds_numel", item.numel()) for item in model.parameters() if item.requires_grad
    )
    rows: list[dict[str, Any]] = []

    def count(moment: str) -> None:
        snapshot = take_snapshot(model, made[0], process.device)
        after = allocated_bytes(process.device)
        rows.append(
            {
                **asdict(case),
                "rank": process.rank,
                "moment": moment,
                "num_parameters": num_parameters,
                **{f"{name}_bytes": snapshot.num_bytes(name) for name in CLASSES},
                "process_bytes": None if before is None or after is None else after - before,
            }
        )

    for index in range(NUM_MICRO):
        is_last = index == NUM_MICRO - 1
        with strategy.accumulate(is_last=is_last):
            strategy.backward(objective.losses(model, prepared).mean() / NUM_MICRO)
        count("before the step" if is_last else "accumulating")
    # AdamW tells when it starts; ZeRO-3 may call it once for each of several groups.
    handle = made[0].register_step_pre_hook(lambda *_: count("in the step"))
    strategy.step(learning_rate=1e-4)
    handle.remove()
    # DeepSpeed 0.19 refers to a stage-3 engine even after destroy(); the next case needs the memory.
    leftovers = take_snapshot(model, made[0], process.device)
    destroy = getattr(model, "destroy", lambda: None)
    destroy()
    leftovers.release()
    return rows
