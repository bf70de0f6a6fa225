"""Commands for what a run, or another trainer, has saved."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import command, group
from kandinsky_dist.runtime.logs import say


def add_checkpoint(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "checkpoint", "Says what a run has saved, and converts it.")

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

    def convert(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.foreign.convert import convert

        for line in convert(
            arguments.src, arguments.out, step=arguments.step, global_batch_size=arguments.global_batch_size
        ):
            say(line)

    parser = command(
        commands,
        "convert",
        convert,
        "Makes a run folder, for run.resume, of a universal checkpoint of DeepSpeed or of a checkpoint-N "
        "folder of the diffusers scripts: weights, moments, averages. Of a run of ours it makes a universal "
        "checkpoint. No pickled objects are read. To diffusers' layout: kandinsky-dist export.",
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="what was saved: its files say by whom")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument(
        "--step", type=int, help="optimizer steps so far (default: those that SRC or its name says)"
    )
    parser.add_argument(
        "--global-batch-size",
        type=int,
        help="samples an optimizer step, over all processes and accumulated ones (default: those that SRC "
        "says; the diffusers scripts do not)",
    )
