"""The command line. Each command imports what it needs when it runs, so that `check` needs no torch."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from kandinsky_dist import __version__
from kandinsky_dist.cli.bench import add_bench
from kandinsky_dist.cli.checkpoints import add_checkpoint
from kandinsky_dist.cli.data import add_data
from kandinsky_dist.cli.estimate import add_estimate
from kandinsky_dist.cli.failures import FailedError, failures_said, give_up_output
from kandinsky_dist.cli.networks import add_export, add_generate, add_models
from kandinsky_dist.cli.precompute import add_precompute
from kandinsky_dist.cli.preflight import add_preflight
from kandinsky_dist.cli.status import add_status
from kandinsky_dist.cli.submit import add_submit
from kandinsky_dist.cli.train import add_check, add_train
from kandinsky_dist.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are a ConfigError like any other; subcommands inherit the class."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 75 stopped, 78 configuration, 65 data, 1 else."""
    try:
        with failures_said():
            arguments, settings = _parser().parse_known_args(argv)
            if settings and not arguments.takes_settings:
                _parser().error(f"unrecognized arguments: {' '.join(settings)}")
            arguments.settings = settings
            arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # while a full disk or a closed pipe can still be told
    except FailedError as failed:
        give_up_output()
        return failed.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kandinsky-dist", description="Distributed training of the Kandinsky 2.2 prior and decoder."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_check(commands)
    add_preflight(commands)
    add_status(commands)
    add_submit(commands)
    add_data(commands)
    add_models(commands)
    add_precompute(commands)
    add_export(commands)
    add_generate(commands)
    add_checkpoint(commands)
    add_bench(commands)
    add_estimate(commands)
    return parser
