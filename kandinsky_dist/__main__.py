"""Entry point of `python -m kandinsky_dist` (and so of torchrun, accelerate launch and deepspeed)."""

import sys
from typing import NoReturn

from kandinsky_dist.cli import main
from kandinsky_dist.errors import KandinskyError
from kandinsky_dist.runtime.deadline import arm


def run() -> NoReturn:
    """Run one command and end the process with its exit code, even if the interpreter hangs at its end."""
    exit_code = KandinskyError.exit_code
    try:
        exit_code = main()
    finally:
        arm(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    run()
