"""Commands for whoever has one GPU for a few minutes."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import SIZES, command
from kandinsky_dist.cli.bench_training import add_inputs, inputs_of
from kandinsky_dist.config.schema import STAGES
from kandinsky_dist.errors import ConfigError


def add_gpu(commands: Any) -> None:
    """Add `bench gpu`, `bench inputs` and `bench memory-gpu`."""

    def gpu(arguments: argparse.Namespace) -> None:
        if find_spec("torch") is None:
            raise ConfigError(
                f"{sys.executable} has no torch, and bench gpu needs a CUDA build of it: install it, or "
                "activate the environment that has it"
            )
        from kandinsky_dist.bench.gpu.run import run

        run(
            arguments.out,
            minutes=arguments.minutes,
            spent_seconds=arguments.spent_seconds,
            size=arguments.size,
            device_type=arguments.device,
            stages=arguments.stage,
        )

    parser = command(
        commands,
        "gpu",
        gpu,
        "Runs the GPU tests and the most important measurements within a fixed time, and ends by itself. "
        "launch/gpu.sh calls it.",
    )
    parser.add_argument("out", type=Path, help="folder for records, gpu.md (the table) and gpu.log")
    parser.add_argument("--minutes", type=float, default=9.0, help="that everything may take")
    parser.add_argument(
        "--spent-seconds", type=float, default=0.0, help="of the minutes, used before this command"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks and the corpus")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which networks")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test the plan, with --size tiny"
    )

    def inputs(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.train_inputs import SHAPES, make_corpus, make_models

        arguments.out.mkdir(parents=True, exist_ok=True)
        make_corpus(arguments.out, arguments.size, make_models(arguments.out, arguments.size, None))
        print(f"networks of size {arguments.size}, {SHAPES[arguments.size].num_samples} samples")

    parser = command(
        commands,
        "inputs",
        inputs,
        "Makes the random networks and the corpus that `bench train OUT` and `bench memory-gpu OUT` make "
        "otherwise, so that their time can be told apart.",
    )
    parser.add_argument("out", type=Path, help="the same folder as theirs")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the networks and the corpus")

    def memory(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.gpu.memory import run

        run(arguments.out, inputs_of(arguments), stages=arguments.stage)

    parser = command(
        commands,
        "memory-gpu",
        memory,
        "Peak memory of real training steps on cached encoders, beside the prediction of `estimate`. Further "
        "settings (--section.key VALUE) are the run's.",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=True)
    add_inputs(parser, "memory_gpu.json and memory_gpu.md")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which networks")
