"""The command that computes encoder outputs in advance."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.train import add_configured, resolved_of
from kandinsky_dist.config import resolve
from kandinsky_dist.config.loader import Resolved
from kandinsky_dist.errors import ConfigError


def add_precompute(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        resolved = resolved_of(arguments)
        check_precompute(arguments, resolved)
        from kandinsky_dist.faults.preempt import StopRequest

        with StopRequest().listening() as stop:
            from kandinsky_dist.precompute.run import Options, precompute

            options = Options(
                out=arguments.out,
                dtype=arguments.dtype,
                flip=arguments.flip,
                batch_size=arguments.batch_size,
            )
            precompute(resolved.config, options, stop)

    parser = add_configured(
        commands,
        "precompute",
        run,
        "Computes what the frozen encoders say of a corpus (data.shards) and keeps it as shards, to train on "
        "with data.source=cached. Any number of processes, on any number of machines, share the work; the "
        "same command again continues.",
    )
    add_precompute_options(parser)


def check_precompute(
    arguments: argparse.Namespace, resolved: Resolved, *, with_packages: bool = True
) -> None:
    """Raises the first rule that options or settings break as a ConfigError."""
    resolve.check(resolved, world_size=1, with_packages=with_packages)
    resolve.check_precompute(resolved.config)
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size} must be above 0")


def add_precompute_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes beside a configuration."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards, seen by all processes")
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16"), default="fp16", help="that outputs are kept in (default: fp16)"
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="keep outputs of the mirrored images too, for data.horizontal_flip",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images that are encoded at once (default: 32)"
    )
