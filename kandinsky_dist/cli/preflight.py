"""The command that looks at all nodes of a job before it trains."""

import argparse
import os
import sys
import time
from typing import Any

from kandinsky_dist.cli.failures import FailedError
from kandinsky_dist.cli.train import add_configured, resolved_of


def add_preflight(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.preflight.gather import gather
        from kandinsky_dist.preflight.judge import problems_of
        from kandinsky_dist.preflight.node import examine

        config = resolved_of(arguments).config
        if arguments.this_node:
            print(examine(config, os.environ).to_line(), flush=True)
            return
        start = time.monotonic()
        words = [arguments.stage, *(["--config", arguments.config] if arguments.config else [])]
        found = gather(config, [*words, *arguments.settings], os.environ, patience=arguments.patience_seconds)
        problems = problems_of(found.nodes, found.reports, found.said)
        for problem in problems:
            print(f"kandinsky-dist: preflight: {problem}", file=sys.stderr)
        if problems:
            raise FailedError(max(problem.exit_code for problem in problems))
        gpus = sum(len(report.gpus) for report in found.reports)
        seconds = time.monotonic() - start
        nodes = f"{len(found.nodes)} node{'s' * (len(found.nodes) != 1)}"
        said = f"preflight: {nodes} fit, {gpus} GPUs, in {seconds:.1f} s"
        print(said, file=sys.stderr, flush=True)

    parser = add_configured(
        commands,
        "preflight",
        run,
        "Looks at every node of the job (or at this machine): versions, GPUs, folders, clocks, shards.",
    )
    parser.add_argument(
        "--patience-seconds", type=float, default=300.0, help="a node's answer is waited for (default: 300)"
    )
    parser.add_argument("--this-node", action="store_true", help="prints this node's own report, as JSON")
