"""Commands that measure."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import SIZES, command, group
from kandinsky_dist.cli.bench_faults import add_faults
from kandinsky_dist.cli.bench_gpu import add_gpu
from kandinsky_dist.cli.bench_training import add_training
from kandinsky_dist.config.schema import STAGES


def add_bench(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "bench", "Measured tables: a JSON record and the table rendered from it.")
    add_training(commands)
    add_faults(commands)
    add_gpu(commands)

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

    def comm(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.comm import STRATEGIES, Plan, run

        plan = Plan(
            size=arguments.size,
            strategies=tuple(name for name in STRATEGIES if name in arguments.strategy),
            max_mib=arguments.max_mib,
            micro_batch_size=arguments.micro_batch_size,
            buckets_mib=tuple(dict.fromkeys(arguments.bucket_mib)),
            num_repeats=arguments.repeats,
        )
        run(arguments.out, plan, world_size=arguments.world_size)

    parser = command(
        commands,
        "comm",
        comm,
        "Bandwidth of collectives by size, and the share of a step that waits for communication.",
    )
    parser.add_argument("out", type=Path, help="folder for comm.json, comm.md and comm.png")
    parser.add_argument(
        "--world-size",
        type=int,
        help="processes to start: one a GPU, or 2 on CPUs; under a launcher its ranks",
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="prior, with random weights")
    strategies = ("ddp", "zero1", "zero2", "zero3")
    parser.add_argument(
        "--strategy", nargs="+", choices=strategies, default=strategies, help="steps' engines"
    )
    parser.add_argument("--micro-batch-size", type=int, default=2, help="samples a step and rank")
    parser.add_argument(
        "--bucket-mib",
        nargs="+",
        type=float,
        default=[25.0],
        help="MiB of a gradient bucket; each value has an engine in memory beside the others",
    )
    parser.add_argument("--max-mib", type=int, help="largest message, MiB: 256 on GPUs, 16 on CPUs")
    parser.add_argument("--repeats", type=int, default=7, help="their median counts")

    def estimate(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.forecast import publish

        publish(arguments.out, arguments.records)

    parser = command(
        commands,
        "estimate",
        estimate,
        "Predictions of both full recipes on 64, 256 and 1,024 GPUs, beside published runs; no measurement.",
    )
    parser.add_argument("out", type=Path, help="folder for estimate.json, estimate.md and estimate.png")
    parser.add_argument(
        "--records", type=Path, help="folder with records of bench scaling and comm, to be predicted too"
    )

    def data(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.data import run

        run(
            arguments.out,
            forms=arguments.form,
            num_samples={"cached": arguments.num_samples_cached, "jpeg": arguments.num_samples_jpeg},
            num_repeats=arguments.repeats,
            seconds=arguments.seconds,
            names=arguments.contender,
        )

    parser = command(
        commands,
        "data",
        data,
        "Samples a second of the loaders here, of other libraries' and of the bare reads, side by side.",
    )
    parser.add_argument("out", type=Path, help="folder for data.json and data.md")
    forms = ("cached", "jpeg")
    parser.add_argument("--form", nargs="+", choices=forms, default=forms, help="kinds of samples")
    parser.add_argument("--num-samples-cached", type=int, default=16384, help="records of 35 KB")
    parser.add_argument("--num-samples-jpeg", type=int, default=512, help="photographs of 1024 pixels")
    parser.add_argument("--repeats", type=int, default=5, help="processes a loader; their median counts")
    parser.add_argument("--seconds", type=float, default=3.0, help="that each of them counts samples for")
    parser.add_argument("--contender", nargs="+", default=(), help="loaders by the beginning of their names")

    def remote(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.data_remote import run

        run(
            arguments.out,
            local=arguments.local,
            remote=arguments.remote,
            num_repeats=arguments.repeats,
            seconds=arguments.seconds,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            read_ahead_mib=arguments.read_ahead_mib,
        )

    parser = command(
        commands, "remote", remote, "The loader on shards over the network, beside the same shards on a disk."
    )
    parser.add_argument("out", type=Path, help="folder for data_remote.json and data_remote.md")
    parser.add_argument("--local", required=True, help="shard folder")
    parser.add_argument("--remote", required=True, help="URL of a copy of it, manifest and sidecars included")
    parser.add_argument("--repeats", type=int, default=5, help="processes each; their median counts")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each of them counts samples for")
    parser.add_argument("--batch-size", type=int, default=32, help="samples a batch")
    parser.add_argument("--num-workers", type=int, default=2, help="decoding threads")
    parser.add_argument("--read-ahead-mib", type=int, default=256, help="MiB fetched in advance")

    def resume(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.data_resume import run

        run(arguments.out, num_shards=arguments.num_shards, num_repeats=arguments.repeats)

    parser = command(
        commands, "resume", resume, "Time to the first batch, by the position where a run goes on."
    )
    parser.add_argument("out", type=Path, help="folder for data_resume.json and data_resume.md")
    parser.add_argument("--num-shards", type=int, default=100_000, help="of 10,000 samples each")
    parser.add_argument("--repeats", type=int, default=5, help="processes a position; their median counts")

    def checkpoint(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.checkpoint import run

        run(
            arguments.out,
            size=arguments.size,
            stage=arguments.stage,
            strategies=arguments.strategy,
            world_size=arguments.world_size,
            num_repeats=arguments.repeats,
        )

    parser = command(
        commands,
        "checkpoint",
        checkpoint,
        "Seconds that training stands still for a checkpoint, waited for and written beside it.",
    )
    parser.add_argument(
        "out", type=Path, help="folder for checkpoint.json and checkpoint.md, on the disk to be measured"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="network, with random weights")
    parser.add_argument("--stage", choices=STAGES, default="prior", help="which network")
    engines = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
    parser.add_argument("--strategy", nargs="+", choices=engines, default=["ddp"], help="engines")
    parser.add_argument("--world-size", type=int, default=2, help="processes; on CPUs where GPUs are fewer")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind; their median counts")

    def optimizer(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.optimizer import run

        run(
            arguments.out,
            size=arguments.size,
            stages=arguments.stage,
            num_repeats=arguments.repeats,
            names=arguments.contender,
        )

    parser = command(
        commands,
        "optimizer",
        optimizer,
        "Seconds of an AdamW update: torch's and DeepSpeed's implementations, on GPU and CPU.",
    )
    parser.add_argument("out", type=Path, help="folder for optimizer.json and optimizer.md")
    parser.add_argument("--size", choices=SIZES, default="small", help="networks whose shapes are updated")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which networks")
    parser.add_argument("--repeats", type=int, default=20, help="steps of each; their median counts")
    parser.add_argument(
        "--contender", nargs="+", default=(), help="implementations by the beginning of their names"
    )

    def draws(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.draws import run

        run(
            arguments.out,
            shards=arguments.shards,
            models=arguments.models,
            stages=arguments.steps,
            num_captions=arguments.captions,
        )

    parser = command(
        commands,
        "draws",
        draws,
        "Variance of the prior's gradient by objective.noise_draws, at equal captions and at equal FLOPs.",
    )
    parser.add_argument("out", type=Path, help="folder for draws.json and draws.md")
    parser.add_argument("--shards", help="corpus with a manifest; by default the demo corpus is made")
    parser.add_argument("--models", type=Path, help="folder with prior/; by default tiny ones are made")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[30, 300, 1500],
        help="of training, when gradients are looked at",
    )
    parser.add_argument("--captions", type=int, default=256, help="whose gradients are looked at, each time")

    def render(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.cases import to_markdown

        print(to_markdown(arguments.record), end="")

    parser = command(
        commands, "render", render, "Prints the Markdown of a record that a bench case has written."
    )
    parser.add_argument(
        "record", type=Path, help="JSON file; or a folder of records of bench train and scaling, for one page"
    )
