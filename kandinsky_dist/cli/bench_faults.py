"""The command that measures how a run of many nodes comes back."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import command
from kandinsky_dist.config.schema import STAGES


def add_faults(commands: Any) -> None:
    """Adds `bench faults`."""

    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.fault_kinds import ANYWHERE
        from kandinsky_dist.bench.faults import Request
        from kandinsky_dist.bench.faults import run as measure
        from kandinsky_dist.bench.faults_report import to_markdown
        from kandinsky_dist.runtime.slurm import run_slurm

        request = Request(
            stage=arguments.stage,
            config=arguments.config or f"{arguments.stage}_tiny",
            num_nodes=arguments.nodes,
            ranks_per_node=arguments.gpus_per_node,
            strategy=arguments.strategy,
            options=tuple(f"--{option}" for option in arguments.sbatch),
            settings=tuple(arguments.settings),
        )
        record = measure(
            arguments.out.absolute(),
            request,
            ANYWHERE,
            call=run_slurm,
            device=f"{arguments.nodes} nodes of a Slurm cluster",
            seed=arguments.seed,
            patience=arguments.patience_seconds,
        )
        print(to_markdown(record), end="")

    parser = command(
        commands,
        "faults",
        run,
        "Submits a run of several nodes with sbatch, lets things happen to it, and says how it came back. "
        "It is compared with the same run in one process, and with the same job, submitted again in peace. "
        "Further settings (--section.key VALUE) are the run's.",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=True)
    parser.add_argument("out", type=Path, help="new folder that all nodes see, for the run and the record")
    parser.add_argument("--stage", choices=STAGES, default="prior", help="which network")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="recipe or YAML file; default: STAGE_tiny")
    parser.add_argument("--nodes", type=int, default=2, help="of the job")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="and ranks")
    parser.add_argument("--strategy", default="ddp", help="parallel.strategy")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more, without the --"
    )
    parser.add_argument("--seed", type=int, default=0, help="of steps and ranks that faults strike")
    parser.add_argument("--patience-seconds", type=float, default=600.0, help="that anything may take")
