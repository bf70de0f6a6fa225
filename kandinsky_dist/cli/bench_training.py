"""Commands that measure whole training steps."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import SIZES, command
from kandinsky_dist.config.loader import command_line_layer
from kandinsky_dist.config.schema import STAGES

ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def add_training(commands: Any) -> None:
    """Adds `bench train`, `bench scaling` and `bench suite`."""

    def train(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.train import run

        run(
            arguments.out,
            _plan(arguments),
            inputs_of(arguments),
            stages=arguments.stage,
            vary=arguments.vary,
            with_baseline=not arguments.no_baseline,
            world_size=arguments.world_size,
        )

    parser = command(
        commands,
        "train",
        train,
        "Samples a second of whole training steps by case, beside the incumbent's way, and what a step is "
        "made of. Further settings (--section.key VALUE) hold for all cases.",
        allow_abbrev=False,
    )
    _add_common(parser, "train")
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY VALUE",
        help="a setting and its values, e.g. --vary parallel.strategy ddp zero2; several make a case of "
        "every combination; none: the ladder of levers, one after another",
    )
    parser.add_argument("--no-baseline", action="store_true", help="our own cases alone")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of each case")

    def scaling(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.scaling import run

        run(
            arguments.out,
            _plan(arguments),
            inputs_of(arguments),
            stages=arguments.stage,
            strategies=arguments.strategy,
            modes=arguments.mode,
            ranks=arguments.ranks,
        )

    parser = command(
        commands,
        "scaling",
        scaling,
        "Samples a second by the number of ranks of this machine. Further settings (--section.key VALUE) "
        "hold for all cases.",
        allow_abbrev=False,
    )
    _add_common(parser, "scaling")
    parser.add_argument("--strategy", nargs="+", choices=ENGINES, default=["ddp"], help="engines")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("weak", "strong"),
        default=["weak", "strong"],
        help="weak: the same micro-batch a rank; strong: the same global batch",
    )
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[], help="by default 1, 2, 4 ... up to the GPUs, or 1 and 2"
    )

    def suite(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.suite import run

        run(
            arguments.out,
            size=arguments.size,
            models=arguments.models,
            shards=arguments.shards,
            strategies=arguments.strategy,
        )

    parser = command(
        commands,
        "suite",
        suite,
        "Ladder and scaling of both stages, and the page about performance from them.",
    )
    add_inputs(parser, "the records, pages and pictures of bench train and bench scaling")
    parser.add_argument(
        "--strategy", nargs="+", choices=ENGINES, default=["ddp"], help="engines of the scaling"
    )


def _add_common(parser: argparse.ArgumentParser, name: str) -> None:
    parser.set_defaults(takes_settings=True)
    add_inputs(parser, f"{name}.json, {name}.md and {name}.png")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which networks")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a case before its first turn")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each case; their median counts")
    parser.add_argument(
        "--alive",
        type=int,
        help="cases that hold memory at once, the first included; 0: all; default: 2 of size full, else all",
    )


def add_inputs(parser: argparse.ArgumentParser, files: str) -> None:
    """Add the arguments that name the networks and the corpus.

    Args:
        parser: of the command.
        files: that the command writes, for --help.
    """
    parser.add_argument("out", type=Path, help=f"folder for {files}, and for networks and corpus")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the networks and the corpus")
    parser.add_argument("--models", type=Path, help="folder with prior/ and decoder/ in place of random ones")
    parser.add_argument("--shards", help="as data.shards, in place of made photographs")


def _plan(arguments: argparse.Namespace) -> Any:
    from kandinsky_dist.bench.train_measure import Plan

    usual = 2 if arguments.size == "full" else 0
    return Plan(
        num_warmup=arguments.warmup,
        num_steps=arguments.steps,
        num_repeats=arguments.repeats,
        num_alive=usual if arguments.alive is None else arguments.alive,
    )


def inputs_of(arguments: argparse.Namespace) -> Any:
    """Return the `Inputs` that the arguments name."""
    from kandinsky_dist.bench.train import Inputs

    settings: Mapping[str, Any] = command_line_layer(arguments.settings).values
    return Inputs(
        size=arguments.size, models=arguments.models, shards=arguments.shards, settings=dict(settings)
    )
