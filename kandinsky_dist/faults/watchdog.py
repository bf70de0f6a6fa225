"""Ends a run that hangs, so that it is started again, and says which rank did not arrive and where it is.

A thread of each rank beats into a small file (`heartbeat`) and looks at two things: how long its own rank has
been in its phase, and whether the rank before it still beats. If either takes too long it reads the beats of
all ranks, judges (`hang`) and leaves its verdict in `hangs/`, where all others find it. A collective cannot
be interrupted, so each then writes down its stacks and ends its process.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kandinsky_dist.config.schema import WatchdogConfig
from kandinsky_dist.errors import explained
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.faults.hang import Hang, judge
from kandinsky_dist.faults.heartbeat import (
    Beat,
    beat_every_seconds,
    beat_file,
    read_beat,
    read_beats,
    start_folder,
    write_beat,
)
from kandinsky_dist.faults.verdict import Verdicts
from kandinsky_dist.runtime.logs import say_failure

EXIT_CODE = 1
LONG_PHASES = ("restore", "validate", "save", "go back", "leave")
START_STEPS = 2
"""Steps of a start that may take as long as the start: the first compiles, the second may once more."""


class Place(NamedTuple):
    """Where a rank is; replaced as one, so that the thread never sees half of it."""

    phase: str
    step: int
    moves: int
    since: float


@dataclass(frozen=True)
class Watched:
    """One start of a run, as its watchdog sees it."""

    run_dir: Path
    fence: Fence
    rank: int
    world_size: int
    config: WatchdogConfig


class Watchdog:
    """Watches one process for as long as it is entered; outside of that it only counts.

    `enter` is called by the training thread and costs a tuple. `begin` starts the thread.
    """

    def __init__(self) -> None:
        self._place = Place("start", 0, 0, time.monotonic())
        self._num_steps = 0  # of this start
        self._device_steps, self._device_since = 0, 0.0
        self._is_entered = False
        self._watched: Watched | None = None
        self._progress: Callable[[], int] = lambda: 0
        self._save_seconds: Callable[[], float] = lambda: 0.0
        self._every = 0.0
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self._num_beats = 0
        self._reading: tuple[float, dict[int, Beat]] | None = None
        self._neighbour: tuple[int, float] = (-1, time.monotonic())

    @staticmethod
    def collective_timeout(config: WatchdogConfig) -> timedelta:
        """How long a collective may wait for a rank: a little longer than the watchdog, which knows more."""
        longest = max(config.start_seconds, config.step_seconds, config.pause_seconds)
        return timedelta(seconds=longest * 1.1 + 60)

    def __enter__(self) -> "Watchdog":
        self._is_entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread is None:
            return
        self._thread.join(self._every)
        code, line = 0, ""
        if error is not None:
            # What the command line has said already is wrapped in an error of its own.
            found = explained(error) or (explained(error.__cause__) if error.__cause__ else None)
            line, code = found or (f"{type(error).__name__}: {error}", EXIT_CODE)
        self._say_how_it_ended(code, line)
        self._progress, self._save_seconds = (
            int,
            float,
        )  # their objects own process groups, which are left next

    def begin(self, watched: Watched, progress: Callable[[], int], save_seconds: Callable[[], float]) -> None:
        """Starts to watch, from another thread. Does nothing where the watchdog is not entered.

        Args:
            watched: what is watched; the run folder must have been taken.
            progress: number of steps that the device has done, which the host runs ahead of; never waits.
            save_seconds: longest that a checkpoint has taken.
        """
        if not self._is_entered:
            return
        self._watched, self._progress, self._save_seconds = watched, progress, save_seconds
        self._every = beat_every_seconds(watched.config.heartbeat_seconds, watched.world_size)
        self._beats = start_folder(watched.run_dir, watched.fence.start)
        self._verdicts = Verdicts(watched.run_dir, watched.fence.start, watched.rank)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Says what this rank does from now on. By the training thread, at the same places on every rank.

        Args:
            phase: its name.
            step: optimizer steps that are done.
        """
        self._place = Place(phase, step, self._place.moves + 1, time.monotonic())

    def stepped(self) -> None:
        """Says that this start has done one more step."""
        self._num_steps += 1

    # What follows runs on the watchdog's thread.

    def _watch(self) -> None:
        assert self._watched is not None
        wait = 0.0
        while not self._is_over.wait(wait):
            wait = self._every
            self._hold_dead_mans_handle()
            try:
                write_beat(self._beats, self._beat())
                self._look()
            except FileNotFoundError:
                self._end_if_fenced()
            except OSError:
                continue  # a run folder that cannot be written now; the next checkpoint will tell

    def _beat(self) -> Beat:
        assert self._watched is not None
        config, place = self._watched.config, self._place
        is_starting = self._num_steps < START_STEPS
        limit = silence = config.start_seconds if is_starting else config.step_seconds
        if place.phase in LONG_PHASES:
            limit = max(limit, config.pause_seconds)
        if config.step_seconds == 0:
            limit = silence = 0.0
        seconds = time.monotonic() - place.since
        if seconds > limit / 4:  # looked at only where it matters
            seconds = min(seconds, self._device_seconds())
        beat = Beat(
            rank=self._watched.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            count=self._num_beats,
            time=time.time(),
            every_seconds=self._every,
            step=place.step,
            phase=place.phase,
            moves=place.moves,
            phase_seconds=seconds,
            limit_seconds=limit,
            silence_seconds=silence,
            save_seconds=self._save_seconds(),
        )
        self._num_beats += 1
        return beat

    def _device_seconds(self) -> float:
        """Seconds since the device was last seen to have done a step."""
        steps = self._progress()
        if steps != self._device_steps:
            self._device_steps, self._device_since = steps, time.monotonic()
        return time.monotonic() - self._device_since

    def _look(self) -> None:
        """Ends the process if there is a verdict, or comes to one."""
        assert self._watched is not None
        if self._verdicts.is_there():
            self._obey()
        mine = self._beat()
        overdue = mine.phase_seconds - mine.limit_seconds if mine.is_overdue else -1.0
        # The lower ranks first: a thousand that judge at once would each read a thousand files.
        is_my_turn = overdue >= 2 * self._every * self._watched.rank.bit_length()
        if not ((overdue >= 0 and is_my_turn) or self._is_neighbour_lost()):
            self._reading = None
            return
        now = time.monotonic()
        if self._reading is None:
            self._reading = now, read_beats(self._beats)
        elif now - self._reading[0] > 2.5 * self._every:
            before, after = self._reading[1], read_beats(self._beats)
            self._reading = now, after
            hang = judge(before, after, time.time(), self._watched.world_size)
            if hang is not None:
                self._say(hang)

    def _is_neighbour_lost(self) -> bool:
        """Whether the rank before this one has been silent for too long, by this process's own clock."""
        assert self._watched is not None
        if self._watched.world_size == 1:
            return False
        rank = (self._watched.rank - 1) % self._watched.world_size
        beat, now = read_beat(beat_file(self._beats, rank)), time.monotonic()
        if beat is None or beat.exit_code is not None:
            return False
        if beat.count != self._neighbour[0]:
            self._neighbour = beat.count, now
        return 0 < beat.silence_seconds < now - self._neighbour[1]

    def _say(self, hang: Hang) -> None:
        """Makes a verdict known to all ranks and to people, and ends."""
        assert self._watched is not None
        if self._verdicts.give(hang):
            prefix = f"[rank {self._watched.rank}] " if self._watched.rank else ""
            where = f"stacks of all ranks that answer: {self._verdicts.folder}"
            print(f"{prefix}{hang.line}; {where}", file=sys.stderr, flush=True)
            self._write_stacks()
            self._wait_for_others(hang)
            self._end(hang.line)
        self._obey()

    def _obey(self) -> None:
        self._write_stacks()
        self._end(self._verdicts.line())

    def _write_stacks(self) -> None:
        self._verdicts.write_stacks(f"{self._place.phase} after step {self._place.step}")

    def _wait_for_others(self, hang: Hang) -> None:
        """Until the others have written down their stacks: where this rank ends the launcher ends them."""
        alive = {rank for rank, beat in read_beats(self._beats).items() if beat.exit_code is None}
        deadline = time.monotonic() + 3 * self._every
        while time.monotonic() < deadline:
            if all(map(self._verdicts.has_stacks, alive - set(hang.ranks))):
                break
            time.sleep(min(0.1, self._every))

    def _end_if_fenced(self) -> None:
        """Ends a process that hangs while a newer start has taken the run folder, and its heartbeat's.

        One that does not hang finds out by itself, before its next log entry or checkpoint.
        """
        assert self._watched is not None
        if not self._beat().is_overdue:
            return
        try:
            self._watched.fence.check()
        except Exception as error:
            found = explained(error)
            assert found is not None
            say_failure(found[0])
            self._leave(found[1])

    def _end(self, line: str) -> None:
        self._say_how_it_ended(EXIT_CODE, line)
        self._leave(EXIT_CODE)

    def _leave(self, code: int) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(code)  # the main thread is in a collective that nothing else gets it out of

    def _say_how_it_ended(self, code: int, line: str) -> None:
        try:
            write_beat(self._beats, replace(self._beat(), exit_code=code, line=line))
        except OSError:
            return  # of a start that is over for all, or on a full disk

    def _hold_dead_mans_handle(self) -> None:
        """Lets the interpreter end the process where this thread cannot: some extension keeps the lock."""
        assert self._watched is not None
        config = self._watched.config
        if config.step_seconds > 0:
            longest = max(config.start_seconds, config.pause_seconds)
            # Fails where stderr is no file.
            with contextlib.suppress(RuntimeError, ValueError, AttributeError, OSError):
                faulthandler.dump_traceback_later(longest + 4 * self._every, exit=True)
