"""The trainer as a user starts it, without paying for its imports each time.

`multiprocessing`'s fork server imports the libraries once and forks every rank from there; a rank then runs
the command line's own `main` with the environment that torchrun would give it. Real processes, real gloo.

Processes that the command spawns are forked from it instead, for the same reason; whatever is handed to them
must still be picklable.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import context as contexts
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any, TypeVar

import psutil
from helpers.command import train_arguments
from torch.distributed import TCPStore

Result = TypeVar("Result")
# One thread a process: OpenMP reads this when torch is imported, in the fork server. In Python 3.11 that does
# not see this folder by itself.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    ),
}


def train(
    stage: str,
    *settings: str,
    models: Path,
    corpus: Path,
    run_dir: Path,
    world_size: int = 1,
    strategy: str = "ddp",
    timeout: float = 300,
) -> CompletedProcess[str]:
    """`helpers.command.train` for tests that start many runs; the same arguments, files and exit code.

    With several ranks the exit code is the highest of theirs, and stderr that of one after another.
    """
    arguments = train_arguments(
        stage, *settings, models=models, corpus=corpus, run_dir=run_dir, strategy=strategy
    )
    return command(*arguments, world_size=world_size, timeout=timeout)


def command(
    *words: object, world_size: int = 1, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`helpers.command.command`, as `train` above; `environment` is added to that of the fork server."""
    from kandinsky_dist.cli import main

    arguments = [str(word) for word in words]
    return call(main, arguments, world_size=world_size, timeout=timeout, environment=environment)


class Ranks:
    """Ranks of a command in the background, with what `subprocess.Popen` has for the tests that disturb them.

    Nobody ends the others when a rank ends: that is the launcher's task, and those tests have a launcher.
    """

    def __init__(self, processes: Sequence[BaseProcess], folder: Path) -> None:
        self._processes = processes
        self._folder = folder

    @property
    def returncode(self) -> int | None:
        """The exit code of the ranks, the largest of theirs; None while one is running."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else max(map(int, codes), key=abs)  # type: ignore[arg-type]

    def poll(self) -> int | None:
        """`returncode`."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for all ranks; returns the exit code."""
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.returncode is None:
            raise TimeoutExpired("ranks", timeout, stderr=self.said())
        return self.returncode

    def said(self) -> str:
        """Return the stderr of the ranks, one after another."""
        ranks = range(len(self._processes))
        return "".join((self._folder / f"err_{rank}").read_text() for rank in ranks)

    def by_rank(self) -> dict[int, psutil.Process]:
        """Rank -> its process."""
        return {rank: psutil.Process(process.pid) for rank, process in enumerate(self._processes)}

    def kill(self) -> None:
        """SIGKILL to every rank and its workers at once."""
        for process in self._processes:
            if process.is_alive():
                family = psutil.Process(process.pid)
                for member in [*family.children(recursive=True), family]:
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
        for process in self._processes:
            process.join()


@contextmanager
def started(arguments: Sequence[str], world_size: int) -> Iterator[Ranks]:
    """`helpers.running.started` without the imports and without a launcher; what is left of it is killed."""
    from kandinsky_dist.cli import main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = _store(world_size)
        processes = [
            _start(main, [list(arguments)], folder, rank, world_size, store, {}) for rank in range(world_size)
        ]
        ranks = Ranks(processes, folder)
        try:
            yield ranks
        finally:
            ranks.kill()


def _store(world_size: int) -> TCPStore | None:
    """A store at a port of the system's choice, held as long as the ranks run, as torchrun's own is."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world_size > 1 else None


def start(folder: Path, *words: object) -> BaseProcess:
    """Starts one `kandinsky-dist` command, which the process ends like; it speaks to `folder`/err_0."""
    from kandinsky_dist.cli import main

    return _start(main, [[str(word) for word in words]], folder, 0, 1, None, {})


def call(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 1,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> CompletedProcess[str]:
    """Calls a function of a module's top level on every rank; what it returns is the rank's exit code."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = _store(world_size)
        ranks = [
            _start(function, arguments, folder, rank, world_size, store, environment or {})
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            is_late = any(process.is_alive() for process in ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        out, error = (
            "".join((folder / f"{name}_{rank}").read_text() for rank in range(world_size))
            for name in ("out", "err")
        )
        if is_late:
            raise TimeoutExpired(str(arguments), timeout, out, error)
    codes = [process.exitcode or 0 for process in ranks]
    return CompletedProcess(str(arguments), max(codes, key=abs), out, error)


def run_on_ranks(function: Callable[..., Result], world_size: int, *arguments: Any) -> list[Result]:
    """`kandinsky_dist.bench.ranks.run_on_ranks` without its imports; what a failing rank said is raised."""
    with tempfile.TemporaryDirectory() as folder:
        by_value = pickle.dumps(arguments)  # a process's own arguments would share the memory of tensors
        done = call(_keep_result, function, Path(folder), by_value, world_size=world_size, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _keep_result(function: Callable[..., Any], folder: Path, arguments: bytes) -> int:
    result = function(*pickle.loads(arguments))
    (folder / os.environ.get("RANK", "0")).write_bytes(pickle.dumps(result))
    return 0


def _start(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    folder: Path,
    rank: int,
    world_size: int,
    store: TCPStore | None,
    environment: Mapping[str, str],
) -> BaseProcess:
    if store is not None:
        environment = {
            **environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.preload"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the server is started with the first process and keeps what it finds
    try:
        process = context.Process(target=_rank, args=(function, arguments, environment, folder, rank))
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def _rank(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    folder: Path,
    rank: int,
) -> None:
    """One rank, in its own process."""
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    contexts._concrete_contexts["spawn"] = _ForkInsteadOfSpawn()
    sys.exit(function(*arguments))


class _HandedOver(contexts.ForkProcess):
    """Forked process that refuses what a spawned one could not receive."""

    def start(self) -> None:
        contexts.set_spawning_popen(_FakePopen)
        try:
            ForkingPickler.dumps((self._target, self._args, self._kwargs))
        finally:
            contexts.set_spawning_popen(None)
        super().start()


class _FakePopen:
    """Lets connections and semaphores be pickled without a new process."""

    DupFd = staticmethod(lambda descriptor: descriptor)
    duplicate_for_child = staticmethod(lambda descriptor: descriptor)


class _ForkInsteadOfSpawn(contexts.ForkContext):
    _name = "spawn"  # of which semaphores take note
    Process = _HandedOver
