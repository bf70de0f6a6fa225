"""How a command that fails says so."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kandinsky_dist.errors import explained
from kandinsky_dist.runtime.logs import say_failure


class FailedError(Exception):
    """A failure that has been said."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


@contextmanager
def failures_said() -> Iterator[None]:
    """Prints the line of an error that has one, and raises FailedError instead."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        found = None if isinstance(error, FailedError) else explained(error)
        if found is None:
            raise
        line, exit_code = found
        say_failure(line)
        raise FailedError(exit_code) from error


def give_up_output() -> None:
    """Drops what stdout cannot take, which the interpreter would try once more and complain about."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
