"""Steps that run one after another within a fixed time.

Each step is a command in a process group of its own. A step is not begun when too little time is left, and is
ended when it exceeds its budget, so that a slow step costs later steps no more than the plan allows.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

GRACE_SECONDS = 5.0
"""Between the request to stop and the kill. Part of a step's budget."""

POLL_SECONDS = 0.05

Verdict = Literal["passed", "failed", "stopped", "left out"]

Start = Callable[..., "subprocess.Popen[bytes]"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a plan.

    Attributes:
        name: shown in the table, and the name of the step's log file.
        command: program and arguments.
        least_seconds: the step is left out when less time is left.
        most_seconds: the step is ended after this time, or earlier to leave later steps their least time.
        after: names of earlier steps that must have passed.
        missing: packages and devices that this machine lacks; the step is left out when there are any.
        is_background: the next step begins without waiting for this one.
        record: file that the command writes, or None.
        kept_as: name of that file among the results.
    """

    name: str
    command: tuple[str, ...]
    least_seconds: float
    most_seconds: float
    after: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    is_background: bool = False
    record: Path | None = None
    kept_as: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one step.

    Attributes:
        verdict: stopped means ended because its budget was exceeded.
        budget_seconds: time that the step was allowed; 0 if it was not begun.
        note: main figure of a step that passed, otherwise the reason.
    """

    name: str
    verdict: Verdict
    seconds: float = 0.0
    budget_seconds: float = 0.0
    note: str = ""


class Runner(Protocol):
    """Runs a step to its end, or until its budget is used up."""

    def __call__(self, step: Step, budget_seconds: float) -> Outcome:
        """Run the step and return its outcome."""

    def close(self) -> None:
        """End all steps that are still running."""


def budget(step: Step, later: Sequence[Step], left_seconds: float) -> float:
    """Return the seconds that a step may take; 0 if too few are left to begin it.

    Later steps keep their least time, unless this step would then have less than its own.
    """
    if left_seconds < step.least_seconds:
        return 0.0
    reserved = sum(other.least_seconds for other in later if not other.missing)
    return max(step.least_seconds, min(step.most_seconds, left_seconds - reserved))


def run_steps(
    steps: Sequence[Step],
    *,
    seconds: float,
    run: Runner,
    report: Callable[[Sequence[Outcome]], object],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the steps of a plan within a fixed time.

    Args:
        steps: most important first.
        seconds: that all steps together may take.
        run: runs one step; called in a thread for background steps.
        report: receives the outcomes known so far, in the order of the steps, whenever one is added.
        clock: seconds that only rise.

    Returns:
        One outcome for each step, in their order.
    """
    begin = clock()
    found: dict[str, Outcome] = {}
    waiting: dict[str, Future[Outcome]] = {}

    def add(outcome: Outcome) -> None:
        found[outcome.name] = outcome
        report(_ordered(steps, found))

    with ThreadPoolExecutor() as threads:
        try:
            for number, step in enumerate(steps):
                for name in [name for name in step.after if name in waiting]:
                    add(waiting.pop(name).result())
                left = seconds - (clock() - begin)
                allowed = budget(step, steps[number + 1 :], left)
                if reason := _reason_to_leave_out(step, found, left):
                    add(Outcome(name=step.name, verdict="left out", note=reason))
                elif step.is_background:
                    waiting[step.name] = threads.submit(run, step, allowed)
                else:
                    add(run(step, allowed))
            for future in waiting.values():
                add(future.result())
        except BaseException:
            run.close()  # or leaving the block would wait for background steps
            raise
    return _ordered(steps, found)


def _ordered(steps: Sequence[Step], found: Mapping[str, Outcome]) -> list[Outcome]:
    return [found[step.name] for step in steps if step.name in found]


def _reason_to_leave_out(step: Step, found: Mapping[str, Outcome], left_seconds: float) -> str:
    if step.missing:
        return f"missing on this machine: {', '.join(step.missing)}"
    for name in step.after:
        if found[name].verdict != "passed":
            return f"needs the step {name!r}, which was {found[name].verdict}"
    if left_seconds < step.least_seconds:
        return f"{max(0.0, left_seconds):.0f} s were left, it needs {step.least_seconds:.0f} s"
    return ""


class Processes:
    """A runner of real processes.

    Args:
        folder: for the steps' log files while they run.
        log: file that each step's output is added to when the step has ended.
        keep: receives a step that has ended and its output; keeps the record, if any, and returns whether
            the results are complete, and the main figure or what is wrong.
        grace_seconds: between the request to stop and the kill.
        start: starts a step's process; called like `subprocess.Popen`.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        keep: Callable[[Step, str], tuple[bool, str]],
        grace_seconds: float = GRACE_SECONDS,
        start: Start = subprocess.Popen,
    ) -> None:
        self._folder, self._log, self._keep = folder, log, keep
        self._grace_seconds, self._start = grace_seconds, start
        self._running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, step: Step, budget_seconds: float) -> Outcome:
        """Run a step's command; its process group never outlives the budget."""
        if step.record is not None:
            step.record.unlink(missing_ok=True)
        begin = time.monotonic()
        path = self._folder / f"{step.name.replace(' ', '_')}.log"
        with path.open("wb") as output:
            process = self._start(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.add(process)
        is_over = not _ends_within(process, budget_seconds - self._grace_seconds)
        if is_over:
            _signal_group(process, signal.SIGTERM)
            _ends_within(process, self._grace_seconds)
        self._end(process)
        seconds = time.monotonic() - begin
        output_text = path.read_text("utf-8", "replace")
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"==== {step.name}: exit code {process.returncode}, {seconds:.0f} s\n{output_text}\n")
        passed, note = self._keep(step, output_text)
        if is_over:
            note = f"did not end within its budget of {budget_seconds:.0f} s"
        elif process.returncode:
            passed, note = False, last_line(output_text) or f"exit code {process.returncode}"
        return Outcome(
            name=step.name,
            verdict="stopped" if is_over else "passed" if passed else "failed",
            seconds=seconds,
            budget_seconds=budget_seconds,
            note=note,
        )

    def close(self) -> None:
        """Kill the process groups of all steps that are still running."""
        for process in list(self._running):
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process not in self._running:
            return
        self._running.remove(process)
        # Also after a normal end: a step may leave children behind, which would disturb the next one.
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process without reaping it, so that its group's number cannot be given to another one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return True
        except ChildProcessError:  # ended by `close`
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)


def last_line(text: str) -> str:
    """Return the last line that is not blank, without ornament, at most 200 characters."""
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return lines[-1][:200] if lines else ""


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
