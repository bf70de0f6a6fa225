"""What every command needs: its place in the parser, and its sizes and stages."""

import argparse
from typing import Any

SIZES = ("tiny", "small", "full")


def command(commands: Any, name: str, run: Any, summary: str, **kwargs: Any) -> argparse.ArgumentParser:
    """Adds a command; `run` is called with its arguments."""
    kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.set_defaults(run=run, takes_settings=False)
    return parser


def group(commands: Any, name: str, summary: str) -> Any:
    """Adds a word that has commands of its own."""
    parser = commands.add_parser(name, help=summary, description=summary)
    return parser.add_subparsers(required=True, metavar="COMMAND")
