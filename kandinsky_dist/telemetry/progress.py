"""How far the run is, for whoever watches it: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from kandinsky_dist.runtime.words import duration, rate


class Progress:
    """A bar where stderr is a terminal, plain lines where it is not, nothing where `is_shown` is false.

    The time left is worked out from the steps of this run alone, after its first: a resumed run did not take
    its first thousand steps in its first second. No host sync.

    Args:
        total_steps: optimizer steps of the whole run, restarts included.
        initial: steps that were done before this start.
        is_shown: true on rank 0 only.
        line_every_seconds: plain lines come at most this often, the last one of the run always.
        stream: where it is shown; None is stderr.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        total_steps: int,
        initial: int,
        is_shown: bool,
        *,
        line_every_seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._step = initial
        self._clock = clock
        self._line_every_seconds = line_every_seconds
        self._stream = stream if stream is not None else sys.stderr
        self._is_shown = is_shown
        self._anchor: tuple[int, float] | None = None  # the step and time from which the rate is taken
        self._figures = ""
        self._last_line: tuple[int, float] | None = None
        self._bar: tqdm | None = None
        if is_shown and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self, step: int, *, loss: float | None = None, samples_per_second: float | None = None
    ) -> None:
        """Shows that `step` optimizer steps of the run are done.

        Args:
            step: steps done, those before this start included.
            loss: the figure of the last log entry; left as it was when None.
            samples_per_second: likewise, over all ranks.
        """
        if not self._is_shown:
            return
        now = self._clock()
        self._step = step
        if self._anchor is None:
            self._anchor = (step, now)
        figures = []
        if loss is not None:
            figures.append(f"loss {loss:.4g}")
        if samples_per_second is not None:
            figures.append(rate(samples_per_second))
        self._figures = ", ".join(figures) or self._figures
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._last_line is None or now - self._last_line[1] >= self._line_every_seconds:
            self._write_line()

    def close(self) -> None:
        """Leaves the final state on the screen."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(), refresh=True)
            self._bar.close()
        elif self._last_line is not None and self._last_line[0] != self._step:
            self._write_line()
        self._is_shown = False

    def seconds_left(self) -> float | None:
        """Seconds to the end of the run at this run's own rate, None before it has one."""
        if self._anchor is None or self._step <= self._anchor[0]:
            return None
        seconds_per_step = (self._clock() - self._anchor[1]) / (self._step - self._anchor[0])
        return max(0, self._total_steps - self._step) * seconds_per_step

    def _status(self) -> str:
        seconds = self.seconds_left()
        left = "?" if seconds is None else duration(seconds)
        return ", ".join(part for part in (self._figures, f"ETA {left}") if part)

    def _write_line(self) -> None:
        self._last_line = (self._step, self._clock())
        print(
            f"step {self._step}/{self._total_steps} ({self._step / max(1, self._total_steps):.1%}), "
            f"{self._status()}",
            file=self._stream,
            flush=True,
        )
