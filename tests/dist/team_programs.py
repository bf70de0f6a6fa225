"""Cases for teams that do no training, run in processes of their own."""

import os
import signal
import time

from kandinsky_dist.bench.teams import OverError, Turns


def count_steps(case: dict, turns: Turns, folder) -> None:
    """Notes every step and when the clock starts; dies or fails at the step that the case names."""
    events: list[str] = []
    turns.on_begin = lambda: events.append("clock")
    turns.on_end = lambda step_seconds: {"events": list(events), "process": os.getpid(), "kind": turns.kind}
    if case.get("cannot_start"):
        raise ValueError("no such\nnetwork")
    turns.ready(time.perf_counter, rank=int(os.environ.get("RANK", "0")))
    number = 0
    try:
        while True:
            turns.step_begins()
            number += 1
            events.append(f"step {number}")
            if case.get("dies_at") == number and os.environ.get("RANK", "0") == case["rank"]:
                print("these are its last words", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    except OverError:
        (folder / "over").touch()
