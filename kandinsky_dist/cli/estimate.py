"""The command that says what a run elsewhere will need."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.train import add_configured, resolved_of
from kandinsky_dist.config import resolve
from kandinsky_dist.errors import ConfigError

GPU_NAMES = ("a100", "h100", "h200", "b200", "l40s")


def add_estimate(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        numbers = tuple(sorted(set(arguments.gpus)))
        if numbers[0] < 1 or arguments.gpus_per_node < 1:
            raise ConfigError("--gpus and --gpus-per-node must be 1 or more")
        resolved = resolved_of(arguments)
        for number in numbers:
            if number % min(number, arguments.gpus_per_node):
                raise ConfigError(
                    f"--gpus {number} does not fill nodes of --gpus-per-node {arguments.gpus_per_node}: "
                    "give a multiple, or less than one node"
                )
            for problem in resolve.problems(resolved, world_size=number, is_elsewhere=True):
                raise ConfigError(problem)
        from kandinsky_dist.bench.forecast import Question, ask
        from kandinsky_dist.estimate.forecast import DEFAULT_FIXED_SECONDS, DEFAULT_MFU, Assumptions
        from kandinsky_dist.models.architectures import MAX_TOKENS

        tokens = MAX_TOKENS if arguments.text_tokens is None else arguments.text_tokens
        mfu = DEFAULT_MFU if arguments.mfu is None else arguments.mfu
        fixed = DEFAULT_FIXED_SECONDS if arguments.fixed_ms is None else arguments.fixed_ms / 1e3
        if not 1 <= tokens <= MAX_TOKENS:
            raise ConfigError(f"--text-tokens {tokens} must be 1 to {MAX_TOKENS}")
        if arguments.record is not None and (arguments.mfu, arguments.fixed_ms) != (None, None):
            raise ConfigError("--mfu and --fixed-ms do nothing with --record, which says what they assume")
        if not 0 < mfu <= 1 or fixed < 0 or arguments.jitter < 0:
            raise ConfigError("--mfu must be in (0, 1], --fixed-ms and --jitter 0 or more")
        question = Question(
            num_gpus=numbers,
            gpus_per_node=arguments.gpus_per_node,
            gpu=arguments.gpu,
            nic_gbits=arguments.nic_gbits,
            num_text_tokens=tokens,
            assumptions=Assumptions(mfu=mfu, fixed_seconds=fixed, jitter=arguments.jitter),
            is_alone=arguments.alone,
            train_record=arguments.record,
            comm_record=arguments.comm,
        )
        ask(resolved, question, arguments.out)

    parser = add_configured(
        commands,
        "estimate",
        run,
        "Memory and time of a run before anyone queues for it, and what would be quicker. Needs no GPU.",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs (default: 8)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node (default: 8)")
    parser.add_argument("--gpu", choices=GPU_NAMES, default="h100", help="kind of GPU (default: h100)")
    parser.add_argument("--nic-gbits", type=float, help="Gb/s of a GPU's NIC (default: its usual server's)")
    parser.add_argument(
        "--text-tokens", type=int, help="tokens of a caption, in the mean over a micro-batch (default: 77)"
    )
    parser.add_argument(
        "--record", type=Path, help="JSON of bench train on one such GPU: its times, in place of --mfu"
    )
    parser.add_argument(
        "--comm", type=Path, help="JSON of bench comm: its latency and bandwidth, in place of published ones"
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the published peak at large micro-batches (default: MLPerf's)"
    )
    parser.add_argument(
        "--fixed-ms", type=float, help="ms of a micro-batch whatever its size (default: MLPerf's)"
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        help="standard deviation of a rank's computing time, as a share of it (default: 0)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="look at no other strategies: several times as quick"
    )
    parser.add_argument("--out", type=Path, help="folder for estimate.json, estimate.md and estimate.png")
