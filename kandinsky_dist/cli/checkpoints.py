"""Commands that look at what a run has saved."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import command, group


def add_checkpoint(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "checkpoint", "Says what a run has saved.")

    def list_(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.inspect import describe

        for line in describe(arguments.run_dir, is_deep=False):
            print(line)

    def verify(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.inspect import describe

        for line in describe(arguments.run_dir, is_deep=True):
            print(line)

    for name, run, summary in (
        ("list", list_, "Lists a run's checkpoints."),
        ("verify", verify, "Reads every byte of a run's checkpoints and compares it with what was written."),
    ):
        parser = command(commands, name, run, summary)
        parser.add_argument("run_dir", metavar="RUN", type=Path, help="run folder")
