"""The command that says how a run is doing."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import command

CLEAR = "\x1b[H\x1b[2J"
ENDED = ("finished", "stopped", "failed")


def add_status(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.status.collect import collect
        from kandinsky_dist.status.text import as_json, lines

        while True:
            status = collect(arguments.run_dir)
            text = as_json(status) if arguments.json else "\n".join(lines(status))
            print(CLEAR + text if arguments.watch and sys.stdout.isatty() else text, flush=True)
            if not arguments.watch or status.state in ENDED:
                return
            time.sleep(arguments.every_seconds)

    parser = command(commands, "status", run, "Says how a run is doing, wherever it runs, from its files.")
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--watch", action="store_true", help="again and again, until the run has ended")
    parser.add_argument("--every-seconds", type=float, default=5.0, help="between two looks, with --watch")
