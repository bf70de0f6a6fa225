"""`bench gpu`: runs the plan, and leaves records, table and log in one folder."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch

from kandinsky_dist.bench.gpu.plan import plan
from kandinsky_dist.bench.gpu.report import figure_of, steps_table, to_markdown
from kandinsky_dist.bench.gpu.steps import Outcome, Processes, Start, Step, last_line, run_steps
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.errors import ConfigError, DataError, KandinskyError
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.runtime.logs import say

RESERVE_SECONDS = 20.0
"""Of the minutes, for the start of this process, the table, and the removal of networks and corpora."""
TESTS = Path(__file__).parents[3] / "tests"


def run(
    out: Path,
    *,
    minutes: float,
    spent_seconds: float,
    size: Size,
    device_type: str,
    stages: Sequence[Stage],
    start: Start = subprocess.Popen,
) -> None:
    """Run the plan within its time; write OUT/gpu.json, gpu.md, gpu.log and the record of each step.

    Args:
        out: folder of results. Networks and corpora lie in a temporary folder, which is removed.
        minutes: that everything may take.
        spent_seconds: of these, used before this process was started.
        size: of the networks.
        device_type: "cuda", or "cpu" to test the plan.
        stages: trained networks.
        start: starts a step's process; called like `subprocess.Popen`.

    Raises:
        ConfigError: no GPU, or no time.
        KandinskyError: a step failed or exceeded its budget.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no GPU on this machine, and bench gpu needs one: run it on a machine "
            "with a GPU and a CUDA build of torch, or try the plan with --device cpu --size tiny"
        )
    if device_type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the steps too
    seconds = 60 * minutes - spent_seconds - RESERVE_SECONDS
    if seconds <= 0:
        raise ConfigError(
            f"--minutes {minutes:g}: {RESERVE_SECONDS:.0f} s are kept for start and end, and nothing is left "
            "for the steps: give more minutes"
        )
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_bytes(b"")
    scratch = Path(tempfile.mkdtemp(prefix="kandinsky-gpu."))
    os.environ["TMPDIR"] = str(scratch)  # what the steps leave in it is removed too
    try:
        steps = plan(scratch, TESTS, size=size, device_type=device_type, stages=stages)
        device = device_name(device_type)
        command = f"launch/gpu.sh OUT --minutes {minutes:g}"
        if (size, device_type) != ("full", "cuda"):
            command += f" --size {size} --device {device_type}"

        def report(outcomes: Sequence[Outcome]) -> Record:
            known = {outcome.name: outcome for outcome in outcomes}
            rows = [known.get(step.name) or _not_reached(step) for step in steps]
            record = Record.now(
                "gpu",
                device=device,
                command=command,
                setting={"minutes": minutes, "size": size, "device_type": device_type},
                rows=[asdict(row) for row in rows],
                packages=("transformers", "accelerate"),
            )
            record.save(out / "gpu.json")
            (out / "gpu.md").write_text(to_markdown(record), "utf-8")
            return record

        report([])
        say(f"{len(steps)} steps in {seconds:.0f} s")
        with _terminable():
            processes = Processes(scratch, log, lambda step, output: keep(step, output, out), start=start)
            outcomes = run_steps(steps, seconds=seconds, run=processes, report=report)
        print(steps_table(report(outcomes)), end="", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if bad := [outcome.name for outcome in outcomes if outcome.verdict in ("failed", "stopped")]:
        raise KandinskyError(f"did not pass: {', '.join(bad)}; see {log}")


def keep(step: Step, output: str, out: Path) -> tuple[bool, str]:
    """Copy a step's record to OUT; return whether it is complete, and its main figure or what is wrong."""
    if step.record is None:
        return True, last_line(output)
    if not step.record.exists():
        return False, "the command wrote no record"
    try:
        record = Record.load(step.record)
    except DataError:
        return False, "the command wrote half a record"
    record.save(out / step.kept_as)
    return figure_of(record)


def _not_reached(step: Step) -> Outcome:
    return Outcome(name=step.name, verdict="left out", note="not reached")


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that steps are ended and the temporary folder is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
