"""`bench faults`: what happens to jobs of many nodes, done on purpose to a real one, one after the other.

A run is submitted with slurm/STAGE.sbatch. At a random step of each of its stretches a fault strikes; then it
must come back by itself. When the run has ended, its losses and samples are compared with those of the same
run in one process that nothing happened to. How far rounding alone takes two runs apart is measured too: the
job is submitted once more and left in peace.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kandinsky_dist.bench.fault_kinds import Fault, Job
from kandinsky_dist.bench.faults_report import to_markdown
from kandinsky_dist.bench.record import Record
from kandinsky_dist.errors import ConfigError, KandinskyError
from kandinsky_dist.submit.checkout import find_checkout
from kandinsky_dist.telemetry.sinks import read_metrics

STRETCH_STEPS = 20
"""Steps of the run for each fault, and before and after all of them."""
EVERY_STEPS = 5
"""Between two checkpoints."""


@dataclass(frozen=True)
class Request:
    """What is submitted.

    Attributes:
        stage: which network.
        config: recipe or YAML file.
        num_nodes: of the job.
        ranks_per_node: of each of them.
        options: further ones of sbatch.
        settings: further words of the training command.
    """

    stage: str
    config: str
    num_nodes: int
    ranks_per_node: int
    strategy: str
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def submission(self, run_dir: Path, output: Path) -> list[str]:
        """The command that queues it."""
        return [
            "sbatch",
            "--parsable",
            f"--nodes={self.num_nodes}",
            f"--gpus-per-node={self.ranks_per_node}",
            f"--output={output}",
            f"--export=ALL,KANDINSKY_CONFIG={self.config}",
            *self.options,
            str(find_checkout(os.environ) / "slurm" / f"{self.stage}.sbatch"),
            *self.settings,
            f"--run.dir={run_dir}",
            f"--parallel.strategy={self.strategy}",
        ]


def run(
    out: Path,
    request: Request,
    faults: Sequence[Fault],
    *,
    call: Callable[[Sequence[str]], str],
    device: str,
    seed: int,
    patience: float = 600.0,
    command: str = "",
) -> Record:
    """Submits the run, lets all faults strike, and compares; writes OUT/faults.json and OUT/faults.md.

    Args:
        out: folder on a file system that all nodes see; the run is left in OUT/run.
        faults: in the order in which they strike.
        call: runs a command where jobs are submitted, returns what it prints, raises where it fails.
        device: the cluster, in words.
        seed: of steps and ranks.
        patience: seconds that anything may take.
        command: that makes this record, where it is another than `bench faults`.

    Raises:
        ConfigError: OUT/run is there already.
        KandinskyError: the run did not come back.
    """
    run_dir, output = out / "run", out / "job.log"
    if run_dir.exists() or output.exists():
        raise ConfigError(f"{out} has the run of an earlier campaign; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    length = (len(faults) + 2) * STRETCH_STEPS + sum(fault.late_steps for fault in faults)
    request = replace(
        request,
        settings=(
            *request.settings,
            f"--run.max_steps={length}",
            f"--checkpoint.every_steps={EVERY_STEPS}",
            "--telemetry.log_every_steps=1",
            "--data.audit=true",
        ),
    )

    def submit(run_dir: Path, output: Path) -> Job:
        number = call(request.submission(run_dir, output))
        return Job(call, int(number.partition(";")[0]), run_dir, output, patience)

    job = submit(run_dir, output)
    struck = list(campaign(job, faults, seed))
    job.complete()
    peaceful = submit(out / "peaceful", out / "peaceful.log")
    _train_undisturbed(request, out / "undisturbed")  # meanwhile: neither run is timed
    peaceful.complete()
    record = Record.now(
        "faults",
        device=device,
        command=command
        or (
            f"kandinsky-dist bench faults OUT --stage {request.stage} --config {request.config} "
            f"--nodes {request.num_nodes} --gpus-per-node {request.ranks_per_node} "
            f"--strategy {request.strategy} --seed {seed}"
        ),
        setting={
            "stage": request.stage,
            "strategy": request.strategy,
            "num_nodes": request.num_nodes,
            "ranks_per_node": request.ranks_per_node,
            "num_steps": length,
            "every_steps": EVERY_STEPS,
            "seed": seed,
        },
        rows=judged(struck, run_dir, peaceful.run_dir, out / "undisturbed"),
    )
    record.save(out / "faults.json")
    (out / "faults.md").write_text(to_markdown(record), "utf-8")
    return record


def _train_undisturbed(request: Request, run_dir: Path) -> None:
    command = [sys.executable, "-m", "kandinsky_dist", "train", request.stage, "--config", request.config]
    done = subprocess.run(
        [*command, *request.settings, f"--run.dir={run_dir}", "--parallel.strategy=ddp"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise KandinskyError(f"the undisturbed run failed: {done.stderr.splitlines()[-1:]}")


@dataclass(frozen=True)
class Struck:
    """What a fault did, by the clock.

    Attributes:
        fault: its name.
        step: last step before it.
        detected_seconds: until the job said or showed that something is wrong.
        resumed_seconds: until a step was made after it.
        steps_again: steps that were made again after it.
    """

    fault: str
    step: int
    detected_seconds: float
    resumed_seconds: float
    steps_again: int


def campaign(job: Job, faults: Sequence[Fault], seed: int) -> Iterator[Struck]:
    """Lets every fault strike once, at a random step of its stretch."""
    dice = random.Random(seed)
    for index, fault in enumerate(faults):
        target = (index + 1) * STRETCH_STEPS + dice.randrange(STRETCH_STEPS // 2)
        job.wait(lambda target=target: job.step >= target, f"come to step {target}")  # type: ignore[misc]
        yield _strike(job, fault, dice)


def _strike(job: Job, fault: Fault, dice: random.Random) -> Struck:
    start, printed = job.start, len(job.printed())
    began = time.monotonic()
    fault.strike(job, dice)
    step = job.step
    detected = job.wait(
        lambda: len(job.printed()) > printed or job.state != "RUNNING" or job.start > start,
        f"notice: {fault.name}",
    )
    if fault.heal:
        fault.heal(job)
    if fault.restarts:
        job.wait(lambda: job.start > start, f"start again after: {fault.name}")
        before = job.num_logged  # the new start has taken the folder, so nobody else writes any more
        resumed = job.wait(lambda: job.num_logged > before, f"make a step after: {fault.name}")
        step = max(job.logged(index) for index in range(before))
        again = max(0, step - job.logged(before) + 1)
    else:
        resumed = job.wait(lambda: job.step > step + 1, f"go on after: {fault.name}")
        again = 0
    return Struck(fault.name, step, detected - began, resumed - began, again)


def judged(
    struck: Sequence[Struck], run_dir: Path, peaceful: Path, undisturbed: Path
) -> list[dict[str, Any]]:
    """Rows of the record: what each fault did to the samples and losses up to the next one.

    Args:
        run_dir: of the run that the faults struck, ended; data.audit=true.
        peaceful: of the same job, which nothing happened to.
        undisturbed: of the same run in one process.
    """
    ours, theirs = (_by_step(folder) for folder in (run_dir, undisturbed))
    apart = {step: abs(loss - theirs[step][0]) for step, (loss, _) in _by_step(peaceful).items()}
    rows = []
    last = max(theirs)
    for item, end in zip(struck, [*(later.step for later in struck[1:]), last], strict=True):
        steps = range(item.step - item.steps_again + 1, end + 1)
        lost, repeated, distance = Counter[str](), Counter[str](), 0.0
        for step in steps:
            loss, keys = ours.get(step, (float("nan"), Counter()))
            right_loss, right_keys = theirs[step]
            lost += right_keys - keys
            repeated += keys - right_keys
            distance = max(distance, abs(loss - right_loss)) if loss == loss else float("inf")
        rows.append(
            {
                "fault": item.fault,
                "step": item.step,
                "detected_seconds": round(item.detected_seconds, 1),
                "resumed_seconds": round(item.resumed_seconds, 1),
                "steps_again": item.steps_again,
                "samples_lost": lost.total(),
                "samples_repeated": repeated.total(),
                "loss_difference": distance,
                "rounding_difference": max(apart[step] for step in range(1, end + 1)),
            }
        )
    return rows


def _by_step(run_dir: Path) -> dict[int, tuple[float, Counter[str]]]:
    """Step -> its loss and the samples that all ranks trained on, by each step's last entry."""
    loss = {entry["step"]: entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl")}
    samples: dict[int, Counter[str]] = {step: Counter() for step in loss}
    for path in (run_dir / "audit").glob("rank_*.jsonl"):
        for entry in read_metrics(path):
            samples.setdefault(entry["step"], Counter()).update(entry["keys"])
    return {step: (loss[step], samples[step]) for step in loss}
