"""Lines for people on stderr: one per event, from the first rank unless a rank speaks of itself."""

import contextlib
import hashlib
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kandinsky_dist.runtime.process import Process

_STORE_TIMEOUT = timedelta(seconds=10)


def say(text: str, process: "Process | None" = None) -> None:
    """Prints one line, from rank 0 only where a process is given."""
    if process is None or process.is_first:
        print(f"kandinsky-dist: {text}", file=sys.stderr, flush=True)


def say_failure(text: str) -> None:
    """Prints why this process ends, once for all ranks that end for the same reason.

    The first rank to say it says it for all: torchrun ends the others as soon as one is gone, so that waiting
    for a certain one could leave nothing said. Works before, in and after a process group.
    """
    if not _is_first_to_say(text):
        return
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    with contextlib.suppress(OSError):  # stderr is closed: the exit code still tells
        print(f"{prefix}{text}", file=sys.stderr, flush=True)


def _is_first_to_say(text: str) -> bool:
    """Whether no other rank of this start has said it. True where there is nobody to ask."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        from torch.distributed import TCPStore

        # torchrun's own: it is there before the ranks are and outlives them.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"kandinsky-dist/{start}/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except Exception:  # twice is better than never
        return True
