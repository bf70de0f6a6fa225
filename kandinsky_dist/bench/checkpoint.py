"""`bench checkpoint`: how long training stands still for a checkpoint, and how much it is slowed meanwhile.

Saves that training waits for and saves beside it alternate in one run, of one model, on one disk.
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kandinsky_dist.bench.memory import Case
from kandinsky_dist.bench.ranks import run_on_ranks
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.render import Column, mib, provenance, table
from kandinsky_dist.bench.workload import build, random_weights, workload
from kandinsky_dist.checkpoint.layout import COMMIT, RunState, folder_name, promised_files
from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.config.schema import Config, DataConfig, ParallelConfig, Stage
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import ModelPlan
from kandinsky_dist.parallel.select import select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.process import Process, joined

MODES = ("waited for", "beside training")
NUM_QUIET_STEPS = 5
"""Steps before each save that nothing is written beside; their median is what a step takes."""


def run(
    out: Path, *, size: Size, stage: Stage, strategies: Sequence[str], world_size: int, num_repeats: int
) -> None:
    """Measures both modes under each strategy; writes OUT/checkpoint.json and OUT/checkpoint.md, prints that.

    The checkpoints are written into a folder in OUT, whose disk is thus the one that is measured; it is
    removed at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    device = ""
    for strategy in strategies:
        case = Case(stage, size, strategy, "auto")
        with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=out) as folder:
            found, device = run_on_ranks(measure, world_size, case, Path(folder), num_repeats)[0]
        rows += found
    record = Record.now(
        "checkpoint",
        device=device,
        command=f"kandinsky-dist bench checkpoint OUT --size {size} --stage {stage} "
        f"--strategy {' '.join(strategies)} --world-size {world_size} --repeats {num_repeats}",
        setting={"size": size, "stage": stage, "world_size": world_size, "num_repeats": num_repeats},
        rows=rows,
    )
    record.save(out / "checkpoint.json")
    (out / "checkpoint.md").write_text(to_markdown(record), "utf-8")
    print(to_markdown(record), end="")


def measure(case: Case, folder: Path, num_repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Measure one case on this rank and those beside it; returns a row for each mode, and the hardware."""
    with joined() as process:
        trained = _Trained(case, process)
        managers = {
            mode: CheckpointManager(
                folder / mode.replace(" ", "_"),
                process,
                keep=2,
                identity={},
                config_yaml="",
                is_async=mode == MODES[1],
            )
            for mode in MODES
        }
        saves: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for number in range(1 + num_repeats):
            for mode, manager in managers.items():
                place = folder / mode.replace(" ", "_") / "checkpoints" / folder_name(number)
                saves[mode].append(_save(trained, manager, number, place))
        rows = [{"strategy": case.strategy, "mode": mode, **_summary(found)} for mode, found in saves.items()]
        return rows, device_name(process.device.type)


class _Trained:
    """A network that takes steps on random tensors."""

    def __init__(self, case: Case, process: Process) -> None:
        config = Config(
            stage=case.stage,
            data=DataConfig(global_batch_size=process.world_size, micro_batch_size=1),
            parallel=ParallelConfig(strategy=case.strategy, precision=case.precision),
        )
        torch.manual_seed(0)
        self._device = process.device
        self._objective, self._prepared = workload(case.stage, case.size, process)
        self.strategy = select(config, process, num_micro=1)
        structure = partial(build, case.stage, case.size)
        self._model = self.strategy.prepare(
            ModelPlan(
                build=structure,
                state_dict=partial(random_weights, structure),
                optimizer=partial(build_adamw, config=config.optim),
            )
        )

    def step(self) -> float:
        """One optimizer step, in seconds."""
        begin = time.perf_counter()
        with self.strategy.accumulate(is_last=True):
            self.strategy.backward(self._objective.losses(self._model, self._prepared).mean())
        self.strategy.step(learning_rate=1e-6)
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _save(trained: _Trained, manager: CheckpointManager, number: int, place: Path) -> dict[str, float]:
    """One save and the steps around it; the slowest rank's figures on every rank."""
    quiet = median(trained.step() for _ in range(NUM_QUIET_STEPS))
    agree.gather(None)  # together
    due, begin = time.time(), time.perf_counter()
    manager.save(trained.strategy, RunState(step=number))
    trained.synchronize()
    stall = time.perf_counter() - begin
    beside: list[float] = []
    while any(agree.gather(manager.is_writing)):
        beside.append(trained.step())
    manager.finish()
    agree.gather(None)
    mine = {
        "stall_seconds": stall,
        "commit_seconds": (place / COMMIT).stat().st_mtime - due,
        "step_seconds": quiet,
        "lost_seconds": stall + sum(seconds - quiet for seconds in beside),
        "num_steps_beside": len(beside),
        "bytes": sum(file["bytes"] for file in promised_files(place).values()),
    }
    found = agree.gather(mine)
    return {name: max(figures[name] for figures in found) for name in mine}


def _summary(saves: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians; the first save, which also makes the memory for the copy, stands by itself."""
    first, *rest = saves
    return {
        **{name: median(save[name] for save in rest) for name in first},
        "first_stall_seconds": first["stall_seconds"],
    }


COLUMNS = (
    Column("strategy", lambda row: row["strategy"], is_number=False),
    Column("save", lambda row: row["mode"], is_number=False),
    Column("stall, s", lambda row: f"{row['stall_seconds']:.3f}"),
    Column("first stall, s", lambda row: f"{row['first_stall_seconds']:.3f}"),
    Column("until COMMIT, s", lambda row: f"{row['commit_seconds']:.3f}"),
    Column("step, s", lambda row: f"{row['step_seconds']:.3f}"),
    Column("steps meanwhile", lambda row: f"{row['num_steps_beside']:g}"),
    Column("training lost, s", lambda row: f"{row['lost_seconds']:.3f}"),
    Column("MiB", lambda row: mib(row["bytes"])),
)


def to_markdown(record: Record) -> str:
    """The record as a page."""
    setting = record.setting
    how = (
        f"The {setting['stage']} of `--size {setting['size']}` with random weights, on "
        f"{setting['world_size']} ranks. Both kinds of saves alternate in one run; medians of "
        f"{setting['num_repeats']}, each the slowest rank's.\n"
    )
    reading = """\
- **stall** is from the moment that a save is due until training goes on: all of the writing, or the copy
  to CPU memory. The **first stall** also makes the memory for the copy.
- **until COMMIT** is from the same moment until the checkpoint is whole on the disk, checksums included.
- **step** is one step on one sample a rank while nothing is written.
- **training lost** is the stall and what the steps taken meanwhile were longer than usual: the thread that
  writes needs time of a processor, which matters where training itself runs on the CPU.
- **MiB** is the whole checkpoint, of all ranks.
"""
    return "\n".join(
        [
            "# The cost of a checkpoint\n",
            provenance(record) + "\n",
            how,
            table(COLUMNS, record.rows),
            "## How to read it\n",
            reading,
        ]
    )
