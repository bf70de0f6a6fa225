"""The command that queues a run on a Slurm cluster."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import group
from kandinsky_dist.cli.precompute import add_precompute_options, check_precompute
from kandinsky_dist.cli.train import add_configured, resolved_of
from kandinsky_dist.config import loader, resolve
from kandinsky_dist.config.schema import STAGES
from kandinsky_dist.errors import ConfigError

# Options that are sbatch's own, handed on under the same name.
_SBATCH = {
    "partition": "partition",
    "account": "account that is charged",
    "qos": "quality of service",
    "time": "time limit, e.g. 24:00:00; the run saves itself before it is over",
    "mem": "memory a node, e.g. 0 for all of it",
    "constraint": "features that the nodes must have",
    "dependency": "what must be over first, e.g. afterok:1234; a job that can never start is removed",
}


def add_submit(commands: Any) -> None:
    """Adds the command."""
    stages = group(commands, "submit", "Queues a run on a Slurm cluster, its settings checked first.")
    for stage in STAGES:
        parser = add_configured(
            stages,
            stage,
            _train,
            f"Queues training of the {stage} through sbatch; the same command again continues it.",
            stage=stage,
            default_config=f"KANDINSKY_CONFIG, else {stage}_full",
        )
        _add_options(parser)
    parser = add_configured(
        stages,
        "precompute",
        _precompute,
        "Queues `kandinsky-dist precompute` through sbatch; several such jobs may share one --out.",
        default_config="KANDINSKY_CONFIG, else prior_full or decoder_full",
    )
    add_precompute_options(parser)
    _add_options(parser)


def _train(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    resolved = resolved_of(arguments)
    resolve.check(
        resolved,
        world_size=arguments.nodes * arguments.gpus_per_node,
        with_packages=_packages_are_these(arguments),
    )
    _submit(arguments, "train", "run.dir", str(resolve.run_dir(resolved.config)), arguments.settings)


def _precompute(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    check_precompute(arguments, resolved_of(arguments), with_packages=_packages_are_these(arguments))
    words = [
        f"--out={arguments.out}",
        f"--dtype={arguments.dtype}",
        f"--batch-size={arguments.batch_size}",
        *(["--flip"] if arguments.flip else []),
        *arguments.settings,
    ]
    _submit(arguments, "precompute", "--out", str(arguments.out), words)


def _submit(arguments: argparse.Namespace, command: Any, key: str, folder: str, words: list[str]) -> None:
    """Makes the job's file and submits it; `folder`, which `key` sets, is where results go."""
    from kandinsky_dist.submit import rules, send
    from kandinsky_dist.submit.checkout import find_checkout
    from kandinsky_dist.submit.script import Job, render

    checkout = find_checkout(os.environ)
    rules.check_absolute(key, folder)
    for word in words:
        rules.check_text("the setting", word)
    srun = []
    if arguments.container is not None:
        rules.check_text("--container", arguments.container)
        mounts = rules.mounts(arguments.mount, checkout)
        if not rules.is_mounted(folder, mounts):
            raise ConfigError(
                f"{key}={folder} is in no mount of the container and would be gone with it: add --mount "
                f"{Path(folder).parent}"
            )
        srun = [f"--container-image={arguments.container}", f"--container-mounts={','.join(mounts)}"]
    elif arguments.mount:
        raise ConfigError(f"--mount {arguments.mount[0]} needs --container")
    if arguments.venv is not None:
        rules.check_absolute("--venv", arguments.venv)
    sbatch = [f"--{name}={value}" for name in _SBATCH if (value := getattr(arguments, name)) is not None]
    if arguments.dependency is not None:
        sbatch.append("--kill-on-invalid-dep=yes")
    if arguments.exclusive:
        sbatch.append("--exclusive")
    job = Job(
        checkout=checkout,
        command=command,
        stage=arguments.stage,
        config=_config_for_nodes(arguments.config),
        words=words,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks=arguments.tasks_per_node,
        name=arguments.job_name or f"kandinsky-{arguments.stage if command == 'train' else command}",
        output=arguments.output,
        sbatch=[*sbatch, *(rules.option("--sbatch", text) for text in arguments.sbatch)],
        srun=[*srun, *(rules.option("--srun", text) for text in arguments.srun)],
        environment=dict(rules.variable(text) for text in arguments.env),
        venv=arguments.venv,
    )
    script = render(job)
    if arguments.dry_run:
        print(script, end="")
        return
    send.make_log_folder(job.output)
    number = send.send(script)
    print(f"job {number}")
    print(f"log {send.log_path(job.output, name=job.name, job=number)}")


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses what is wrong by itself, and fills in the configuration that slurm/train.sh would take."""
    from kandinsky_dist.submit import rules

    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        raise ConfigError("--nodes and --gpus-per-node must be 1 or more")
    for name in (*_SBATCH, "job_name", "output", "venv"):
        if getattr(arguments, name) is not None:
            rules.check_text(f"--{name.replace('_', '-')}", getattr(arguments, name))
    if arguments.config is None:
        arguments.config = os.environ.get("KANDINSKY_CONFIG") or f"{arguments.stage}_full"
    rules.check_text("--config", arguments.config)


def _config_for_nodes(config: str) -> str:
    return config if config in loader.recipe_names() else str(Path(config).absolute())


def _packages_are_these(arguments: argparse.Namespace) -> bool:
    """Whether the job runs in this process's environment: what is missing here is missing there."""
    environment = arguments.venv or os.environ.get("VIRTUAL_ENV")
    if arguments.container is not None or environment is None:
        return False
    return Path(environment).resolve() == Path(sys.prefix).resolve()


def _add_options(parser: argparse.ArgumentParser) -> None:
    from kandinsky_dist.submit.script import DEFAULT_OUTPUT

    job = parser.add_argument_group("job")
    job.add_argument("--dry-run", action="store_true", help="print the file for sbatch and submit nothing")
    job.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    job.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs a node, a rank each (default: 8)"
    )
    for name, meaning in _SBATCH.items():
        job.add_argument(f"--{name}", help=meaning)
    job.add_argument("--exclusive", action="store_true", help="share nodes with no other job")
    job.add_argument("--job-name", help="(default: kandinsky- and what it runs)")
    job.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        help=f"log, with sbatch's patterns (default: {DEFAULT_OUTPUT.replace('%', '%%')})",
    )
    job.add_argument(
        "--tasks-per-node",
        choices=("node", "rank"),
        default="node",
        help="node: one task of srun a node, which starts its ranks and can restart them; rank: one task a "
        "rank (default: node)",
    )
    job.add_argument(
        "--venv", metavar="DIR", help="virtual environment (default: the active one, else the checkout's)"
    )
    job.add_argument("--container", metavar="IMAGE", help="run inside this image, where Slurm has pyxis")
    job.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE[:TARGET[:FLAGS]]",
        help="folder that the container sees, beside the checkout; repeatable",
    )
    job.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the job, beside those that are exported where it is submitted; repeatable",
    )
    job.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="OPTION",
        help="long option for srun, e.g. cpu-bind=none; repeatable",
    )
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another long option for sbatch, e.g. cpus-per-task=64; repeatable",
    )
