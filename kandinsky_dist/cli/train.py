"""Commands that take a configuration."""

import argparse
import os
from typing import Any

from kandinsky_dist.cli.arguments import command
from kandinsky_dist.cli.failures import failures_said
from kandinsky_dist.config import launch_env, loader, resolve
from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.config.schema import SECTIONS, STAGES, Stage


def add_train(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        resolved = resolved_of(arguments)
        resolve.check(resolved, world_size=read_ranks(os.environ).world_size)
        from kandinsky_dist.faults.preempt import StopRequest

        with StopRequest().listening() as stop:
            from kandinsky_dist.faults.watchdog import Watchdog
            from kandinsky_dist.runtime.process import joined
            from kandinsky_dist.train.trainer import Trainer

            patience = Watchdog.collective_timeout(resolved.config.watchdog)
            run_folder = resolve.run_dir(resolved.config)
            # The outcome is printed and recorded before the groups are left: a process may hang there.
            with (
                joined(patience, run_folder, is_recorded=True) as process,
                Watchdog() as dog,
                failures_said(),
            ):
                Trainer(resolved, process, stop, dog).run()

    add_configured(commands, "train", run, "Trains a stage; the same command again continues it.")


def add_check(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        resolved = resolved_of(arguments)
        resolve.check(resolved, world_size=arguments.world_size)
        print(resolved.to_yaml(), end="")

    parser = add_configured(
        commands,
        "check",
        run,
        "Validates a configuration, without torch, and prints it with the origin of each value.",
    )
    parser.add_argument(
        "--world-size", type=int, default=1, help="ranks the batch is divided over (default: 1)"
    )


def settings_help() -> str:
    """Every configuration key with its default and meaning."""
    lines = ["settings (--section.key value, or the same keys in a YAML file):"]
    for section, cls in SECTIONS.items():
        for item in cls.__dataclass_fields__.values():
            default = "null" if item.default is None else str(item.default)
            only = f" [{item.metadata['stage']} only]" if item.metadata["stage"] else ""
            lines.append(f"  {section}.{item.name} ({default}): {item.metadata['doc']}{only}")
    return "\n".join(lines)


def add_configured(
    commands: Any,
    name: str,
    run: Any,
    summary: str,
    *,
    stage: Stage | None = None,
    default_config: str = "defaults only",
) -> argparse.ArgumentParser:
    """Adds a command that takes a stage, a configuration and settings.

    Args:
        commands: where it is added.
        name: its word.
        run: called with its arguments.
        summary: for --help.
        stage: the only one that it is for, which is not asked for then.
        default_config: what is taken without --config, for --help.
    """
    parser = command(
        commands,
        name,
        run,
        summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(loader.recipe_names())}\n\n{settings_help()}",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=True)
    if stage is None:
        parser.add_argument("stage", choices=STAGES, help="which of the two networks")
    else:
        parser.set_defaults(stage=stage)
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help=f"recipe name or YAML file (default: {default_config})"
    )
    return parser


def resolved_of(arguments: argparse.Namespace) -> loader.Resolved:
    """The configuration that a command was given."""
    layers = [launch_env.accelerate_layer(os.environ), loader.command_line_layer(arguments.settings)]
    return loader.load(arguments.stage, arguments.config, [layer for layer in layers if layer is not None])
