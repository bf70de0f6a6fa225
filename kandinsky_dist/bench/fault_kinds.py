"""Things that happen to a job of many nodes, and the job that they happen to."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kandinsky_dist.errors import KandinskyError
from kandinsky_dist.faults.fence import read_owner
from kandinsky_dist.faults.heartbeat import Beat, read_beats, start_folder
from kandinsky_dist.telemetry.sinks import read_metrics

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
LOOK_SECONDS = 0.1
LATE_STEPS = 300
"""Of a tiny network, in the half-minute after which Slurm notices a lower limit."""


class Job:
    """The run's job, and the run as its files tell of it.

    Args:
        call: runs a command where jobs are submitted, returns what it prints, raises where it fails.
        number: of the job.
        run_dir: run.dir, seen from here.
        output: what the job prints, over all its starts.
    """

    def __init__(
        self, call: Callable[[Sequence[str]], str], number: int, run_dir: Path, output: Path, patience: float
    ) -> None:
        self.call = call
        self.number = number
        self.run_dir = run_dir
        self.output = output
        self.patience = patience

    def fields(self) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.call(["scontrol", "--oneliner", "show", "job", str(self.number)]).split()
        return {key: value for key, _, value in (word.partition("=") for word in reversed(words))}

    @property
    def state(self) -> str:
        """RUNNING, PENDING, ..."""
        return self.fields()["JobState"]

    @property
    def start(self) -> int:
        """How often the run has been started; 0 before the first time."""
        owner = read_owner(self.run_dir)
        return owner.start if owner else 0

    @property
    def step(self) -> int:
        """The highest step that was logged."""
        path = self.run_dir / "metrics.jsonl"
        entries = read_metrics(path) if path.exists() else []
        return int(entries[-1]["step"]) if entries else 0

    @property
    def num_logged(self) -> int:
        """Entries in metrics.jsonl, those of steps that were made again included."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def logged(self, index: int) -> int:
        """The step of an entry, by its place in the file."""
        return int(json.loads((self.run_dir / "metrics.jsonl").read_bytes().splitlines()[index])["step"])

    def beats(self) -> dict[int, Beat]:
        """Rank -> what it said last."""
        return read_beats(start_folder(self.run_dir, self.start))

    def printed(self) -> str:
        """All that the job has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def on_node(self, node: str, command: Sequence[str]) -> str:
        """Runs a command beside the job's own on one of its nodes."""
        step = [
            "srun",
            "--overlap",
            f"--jobid={self.number}",
            f"--nodelist={node}",
            "--nodes=1",
            "--ntasks=1",
        ]
        return self.call([*step, *command])

    def update(self, **values: object) -> None:
        """`scontrol update`."""
        words = [f"{key}={value}" for key, value in values.items()]
        self.call(["scontrol", "update", f"JobId={self.number}", *words])

    def wait(self, is_so: Callable[[], bool], what: str) -> float:
        """Looks until a fact holds; returns the moment.

        Raises:
            KandinskyError: it does not within the patience, or the job has ended.
        """
        deadline = time.monotonic() + self.patience
        while not is_so():
            state = self.state
            if (state in ENDED and not is_so()) or time.monotonic() > deadline:
                last = "; ".join(self.printed().splitlines()[-3:])
                raise KandinskyError(f"job {self.number} ({state}) was to {what}; it said: {last}")
            time.sleep(LOOK_SECONDS)
        return time.monotonic()

    def complete(self) -> None:
        """Waits for its end, while it makes steps.

        Raises:
            KandinskyError: it did not end well, or made no step within the patience.
        """
        while self.state not in ENDED:
            last = self.num_logged
            self.wait(lambda last=last: self.num_logged > last or self.state in ENDED, "go on")  # type: ignore[misc]
        if self.state != "COMPLETED":
            said = "; ".join(self.printed().splitlines()[-1:])
            raise KandinskyError(f"job {self.number} ended as {self.state}; it said: {said}")


@dataclass(frozen=True)
class Fault:
    """Something that happens.

    Attributes:
        name: for people.
        strike: does it.
        heal: takes it back once it has been noticed, where it does not go away by itself.
        restarts: whether the run must be started again; else it goes on in the same processes.
        late_steps: that the run may make before it strikes.
    """

    name: str
    strike: Callable[[Job, random.Random], None]
    heal: Callable[[Job], None] | None = None
    restarts: bool = True
    late_steps: int = 0


def kill_rank(job: Job, dice: random.Random) -> None:
    """SIGKILL to a rank."""
    _signal_rank(job, dice, "-KILL")


def stop_rank(job: Job, dice: random.Random) -> None:
    """SIGSTOP to a rank: it hangs, and its process stays."""
    _signal_rank(job, dice, "-STOP")


def kill_worker(job: Job, dice: random.Random) -> None:
    """SIGKILL to the data workers of a rank."""
    beat = dice.choice([*job.beats().values()])
    job.on_node(beat.host, ["pkill", "-KILL", "--parent", str(beat.pid)])


def ask_to_stop(job: Job, _dice: random.Random) -> None:
    """What --signal=B:USR1 sends before the time is over."""
    job.call(["scancel", "--batch", "--signal=USR1", str(job.number)])


def requeue(job: Job, _dice: random.Random) -> None:
    """What an operator does: no warning but SIGTERM."""
    job.call(["scontrol", "requeue", str(job.number)])


def end_time(job: Job, _dice: random.Random) -> None:
    """The job's time limit is almost reached: the signal before its end is due at once."""
    elapsed = job.fields()["RunTime"].split("-")[-1].split(":")
    job.update(TimeLimit=int(elapsed[0]) * 60 + int(elapsed[1]) + 2)


def give_time(job: Job) -> None:
    """Takes `end_time` back while the job waits for its next start."""
    job.wait(lambda: job.state == "PENDING", "be requeued")
    job.update(TimeLimit="UNLIMITED")


def move_to(num_nodes: int) -> Callable[[Job, random.Random], None]:
    """The run goes on with another number of nodes."""

    def strike(job: Job, dice: random.Random) -> None:
        ask_to_stop(job, dice)
        job.wait(lambda: job.state == "PENDING", "be requeued")
        fields = job.fields()
        num_cpus = int(fields["NumCPUs"]) * num_nodes // int(fields["NumNodes"].partition("-")[0])
        job.update(NumNodes=f"{num_nodes}-{num_nodes}", NumTasks=num_nodes, NumCPUs=num_cpus)

    return strike


def _signal_rank(job: Job, dice: random.Random, word: str) -> None:
    beat = dice.choice([*job.beats().values()])
    job.on_node(beat.host, ["kill", word, str(beat.pid)])


TIME_LIMIT = Fault("time limit", end_time, heal=give_time, late_steps=LATE_STEPS)
"""For the end of a campaign: Slurm looks every 30 seconds only, and the run goes on until it does."""
ANYWHERE = (
    Fault("SIGKILL of a rank", kill_rank),
    Fault("SIGKILL of a rank's data workers", kill_worker, restarts=False),
    Fault("SIGSTOP of a rank", stop_rank),
    Fault("USR1 to the batch shell", ask_to_stop),
    Fault("scontrol requeue", requeue),
    TIME_LIMIT,
)
"""Faults that Slurm alone can bring about, on any cluster."""
