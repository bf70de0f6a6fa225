"""Commands that measure."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import SIZES, command, group
from kandinsky_dist.config.schema import STAGES


def add_bench(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "bench", "Measured tables: a JSON record and the table rendered from it.")

    def memory(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.memory import run

        run(arguments.out, size=arguments.size, stages=arguments.stage, world_size=arguments.world_size)

    parser = command(
        commands,
        "memory",
        memory,
        "Bytes of model states a rank under each strategy, beside the textbook's formulas.",
    )
    parser.add_argument("out", type=Path, help="folder for memory.json and memory.md")
    parser.add_argument("--size", choices=SIZES, default="small", help="networks, with random weights")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which networks")
    parser.add_argument("--world-size", type=int, default=2, help="processes; on CPUs where GPUs are fewer")

    def render(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.cases import to_markdown

        print(to_markdown(arguments.record), end="")

    parser = command(
        commands, "render", render, "Prints the Markdown of a record that a bench case has written."
    )
    parser.add_argument("record", type=Path, help="JSON file")
