"""Starts this node's ranks under torchrun, and ends with the exit status that they ended with.

torchrun itself ends with 1 whatever its workers said, and takes a signal as the order to end them within
30 seconds. Here SIGUSR1, SIGTERM and the first Ctrl-C are passed on, the ranks take the time they need to
save themselves, and "stopped on request, resume me" (75) reaches whoever started the run.

Arguments: torchrun's.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from types import FrameType

import psutil

# Where ranks fail, the node that hosts the meeting may leave first; the other launchers would each print
# a C++ stack trace about it. The variable is read at import and is not for the ranks.
log_level = os.environ.get("TORCH_CPP_LOG_LEVEL")
os.environ["TORCH_CPP_LOG_LEVEL"] = log_level or "ERROR"
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure  # noqa: E402
from torch.distributed.launcher import api  # noqa: E402
from torch.distributed.run import parse_args, run  # noqa: E402

if log_level is None:
    del os.environ["TORCH_CPP_LOG_LEVEL"]

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
STOPPED = 75
SAID_BY_RANKS = (STOPPED, 78, 65)
"""Exit statuses after which the ranks have already told the reader all there is to tell, and which would come
again: they are never restarted."""


class Agent(api.LocalElasticAgent):  # type: ignore[name-defined]
    """torchrun's agent, which restarts ranks that crash (--max-restarts), but not those that meant to end."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        codes = [failure.exitcode for failure in result.failures.values()]
        if result.state == WorkerState.FAILED and self._remaining_restarts > 0:
            if any(code in SAID_BY_RANKS for code in codes):
                self._remaining_restarts = 0
            else:
                what = f"{_ended(result.failures)}; restarted in place"
                print(f"{socket.gethostname()}: {what}", file=sys.stderr, flush=True)
        return result


api.LocalElasticAgent = Agent


def main(arguments: list[str]) -> int:
    """Runs torchrun with `arguments`; returns the exit status for the shell."""
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    signal.signal(signal.SIGINT, _stop_at_keyboard)
    # torchrun's own account of every rank it ends; ours is one line, below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        # torchrun keeps the signals that mean "now".
        run(parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        status = exit_status(failure.exitcode for failure in failures)
        if status not in SAID_BY_RANKS:
            print(f"{socket.gethostname()}: {_ended(error.failures)}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _ended(failures: Mapping[int, ProcessFailure]) -> str:
    """What ranks ended with, the earliest first."""
    ordered = sorted(failures.items(), key=lambda item: item[1].timestamp)
    return "ranks ended with " + ", ".join(f"rank {rank}: {failure.exitcode}" for rank, failure in ordered)


def exit_status(codes: Iterable[int]) -> int:
    """One exit status for ranks that failed.

    A message for people (78, 65) explains the others' failures; a crash wins over a stop on request, so that
    75 means that every rank was saved. SIGTERM is what torchrun ends the remaining ranks with, so it counts
    only if nothing else is known.

    Args:
        codes: exit codes of the failed ranks, earliest first; -n for signal n.

    Returns:
        The exit status as a shell gives it, 128 + n for signal n.
    """
    known = [code for code in codes if code != 0]
    causes = [code for code in known if code != -signal.SIGTERM] or known
    told = [code for code in causes if code in (78, 65)]
    crashes = [code for code in causes if code != STOPPED]
    first = [*told, *crashes, *causes][0]
    return first if first > 0 else 128 - first


def _pass_on(number: int, _frame: FrameType | None) -> None:
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _stop_at_keyboard(_number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C asks the ranks to save themselves and stop; the second one ends them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("stopping after this step; Ctrl-C again ends it at once", file=sys.stderr, flush=True)
    _pass_on(signal.SIGUSR1, frame)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
