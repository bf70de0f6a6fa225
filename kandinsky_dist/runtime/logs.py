"""Lines for people on stderr: one per event, from the first rank unless a rank speaks of itself."""

import sys

from kandinsky_dist.runtime.process import Process


def say(text: str, process: Process | None = None) -> None:
    """Prints one line, from rank 0 only where a process is given."""
    if process is None or process.is_first:
        print(f"kandinsky-dist: {text}", file=sys.stderr, flush=True)
