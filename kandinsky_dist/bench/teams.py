"""Processes that stay and take turns: every case has its own, and nothing but the machine is shared.

A case that has its turn is told so; the others wait without using the machine. Cases that are compared thus
alternate, and none inherits another's allocator, compiled kernels or threads.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import TCPStore

from kandinsky_dist.bench.ranks import environment, machine_settings

JOIN_SECONDS = 10.0
LOG_LINES = 12

Kind = Literal["train", "reduced", "silent"]


class CaseFailedError(Exception):
    """A case's processes could not go on; the message is the reason in one line."""


class OverError(Exception):
    """No more turns: raised inside a case to end it."""


@dataclass(frozen=True)
class Turn:
    """What a case is told to do.

    Attributes:
        num_warmup: steps before the clock starts.
        num_steps: steps on the clock.
        kind: train; reduced: the same at learning rate 0; silent: that without reducing gradients.
    """

    num_warmup: int
    num_steps: int
    kind: Kind = "train"


class Turns:
    """A case's side: it says where each optimizer step begins, and is made to wait there between its turns.

    Attributes:
        kind: of the turn that is under way.
        first_loss: this rank's loss of its very first step, on the device.
        on_begin: called when the clock starts.
        on_end: called with the seconds of a step when the clock has stopped; goes with the result.
        pause: surrounds waiting.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._turn: Turn | None = None
        self._num_left = 0
        self.kind: Kind = "train"
        self.first_loss: torch.Tensor | None = None
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[float], dict[str, Any]] = lambda step_seconds: {}
        self.pause: Callable[[], AbstractContextManager[None]] = nullcontext
        self._clock: Callable[[], float] = lambda: 0.0

    def ready(self, clock: Callable[[], float], **facts: Any) -> None:
        """Says that everything is built.

        Args:
            clock: seconds, once the device has finished all its work.
            facts: of the case, for its row.
        """
        self._clock = clock
        self._connection.send(("ready", facts))

    def step_begins(self) -> None:
        """To be called before each optimizer step.

        Raises:
            OverError: there are no more turns.
        """
        if self._num_left == 0:
            self._take()
        assert self._turn is not None
        if self._num_left == self._turn.num_steps:
            self.on_begin()
            self._begin = self._clock()
        self._num_left -= 1

    def _take(self) -> None:
        if self._turn is not None:
            step_seconds = (self._clock() - self._begin) / self._turn.num_steps
            result = {"step_seconds": step_seconds, **self.on_end(step_seconds)}
            if self.first_loss is not None:
                result["first_loss"] = float(self.first_loss)
            self._connection.send(("done", result))
        with self.pause():
            try:
                self._turn = self._connection.recv()
            except EOFError:  # the parent is gone
                self._turn = None
        if self._turn is None:
            raise OverError
        self.kind = self._turn.kind
        self._num_left = self._turn.num_warmup + self._turn.num_steps


Run = Callable[[Any, Turns, Path], None]
"""Runs a case until OverError is raised in it; a function of a module's top level."""


class Team:
    """A case's ranks, seen from the process that gives out turns. They are started and not waited for.

    Args:
        run: what every rank calls.
        case: its argument, picklable.
        world_size: ranks.
        is_on_cpu: whether GPUs are hidden from them.
        folder: for what a case writes, and the ranks' output.
    """

    def __init__(self, run: Run, case: Any, world_size: int, folder: Path, *, is_on_cpu: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # A port of the system's choice, held from here on.
        self._store: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        with environment(machine_settings(world_size, is_on_cpu=is_on_cpu)):  # read when torch is imported
            for rank in range(world_size):
                here, there = context.Pipe()
                variables = _launch_variables(rank, world_size, port) if world_size > 1 else {}
                process = context.Process(target=_rank, args=(run, case, there, folder, rank, variables))
                process.start()
                there.close()
                self._connections.append(here)
                self._processes.append(process)

    def wait_ready(self) -> dict[str, Any]:
        """What rank 0 says of the case when all ranks have built it.

        Raises:
            CaseFailedError: a rank could not.
        """
        return self._answers()[0]

    def take(self, turn: Turn) -> list[dict[str, Any]]:
        """Has the case take a turn; each rank's result.

        Raises:
            CaseFailedError: a rank ended.
        """
        for connection in self._connections:
            try:
                connection.send(turn)
            except OSError:
                raise CaseFailedError(self._last_words()) from None
        return self._answers()

    def close(self) -> None:
        """Ends the processes, by force where they do not end by themselves."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(JOIN_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        self._connections, self._processes, self._store = [], [], None

    def _answers(self) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._connections):
            missing = {self._connections[rank]: rank for rank in self._missing(found)}
            for connection in wait(list(missing)):  # ready too where the process has ended
                rank = missing[connection]  # type: ignore[index]
                try:
                    word, content = self._connections[rank].recv()
                except (EOFError, OSError):
                    raise CaseFailedError(self._last_words()) from None
                if word == "failed":
                    raise CaseFailedError(content)
                found[rank] = content
        return [found[rank] for rank in range(len(self._connections))]

    def _missing(self, found: Mapping[int, Any]) -> Sequence[int]:
        return [rank for rank in range(len(self._connections)) if rank not in found]

    def _last_words(self) -> str:
        for path in sorted(self._folder.glob("rank_*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return f"a process has ended: {lines[-1][:300]}"
        codes = [process.exitcode for process in self._processes]
        return f"a process has ended with exit code {next((code for code in codes if code), 0)}"


def _launch_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(
    run: Run, case: Any, connection: Connection, folder: Path, rank: int, variables: Mapping[str, str]
) -> None:
    """One rank, in its own process."""
    # A spawned process would spawn its data workers too; they are to start as in a training run.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(variables)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    code = 0
    try:
        run(case, Turns(connection), folder)
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())
        with contextlib.suppress(OSError):
            connection.send(("failed", f"{type(error).__name__}: {text[:300]}"))
        code = 1
    connection.close()
    os._exit(code)  # engines' threads would be waited for
