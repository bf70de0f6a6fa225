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
        from kandinsky_dist.preflight.gather import gather, gather_links
        from kandinsky_dist.preflight.judge import problems_of, slow_links
        from kandinsky_dist.preflight.network import measure
        from kandinsky_dist.preflight.node import examine, node_name

        config = resolved_of(arguments).config
        if arguments.this_node:
            print(examine(config, os.environ).to_line(), flush=True)
            return
        if arguments.links:
            print(measure(node_name(os.environ), os.environ).to_line(), flush=True)
            return
        start = time.monotonic()
        words = [arguments.stage, *(["--config", arguments.config] if arguments.config else [])]
        words += arguments.settings
        patience, floor = arguments.patience_seconds, arguments.min_gb_s
        found = gather(config, words, os.environ, patience=patience)
        problems = problems_of(found.nodes, found.reports, found.said)
        network = ""
        if floor and len(found.nodes) > 1 and not problems:
            links = gather_links(found.nodes, words, os.environ, patience=patience)
            problems = slow_links(found.nodes, links, floor)
            network = f", all-reduce at {min(link.all_reduce for link in links):.3g} GB/s" if links else ""
        for problem in problems:
            print(f"kandinsky-dist: preflight: {problem}", file=sys.stderr)
        if problems:
            raise FailedError(max(problem.exit_code for problem in problems))
        gpus = sum(len(report.gpus) for report in found.reports)
        seconds = time.monotonic() - start
        nodes = f"{len(found.nodes)} node{'s' * (len(found.nodes) != 1)}"
        said = f"preflight: {nodes} fit, {gpus} GPUs{network}, in {seconds:.1f} s"
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
    parser.add_argument(
        "--min-gb-s",
        type=float,
        default=os.environ.get("KANDINSKY_MIN_GB_S", "0"),
        help="bus bandwidth that an all-reduce between the nodes, of one GPU each, must reach, in GB/s; "
        "0 measures nothing (default: KANDINSKY_MIN_GB_S, else 0)",
    )
    parser.add_argument("--this-node", action="store_true", help="prints this node's own report, as JSON")
    parser.add_argument("--links", action="store_true", help="measures as one of the nodes, prints JSON")
