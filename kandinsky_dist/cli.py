"""The command line. Each command imports what it needs when it runs, so that `check` needs no torch."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kandinsky_dist import __version__
from kandinsky_dist.config import launch_env, loader, resolve
from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.config.schema import SECTIONS, STAGES
from kandinsky_dist.errors import ConfigError, explained
from kandinsky_dist.runtime.logs import say, say_failure

SIZES = ("tiny", "small", "full")


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are a ConfigError like any other; subcommands inherit the class."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


class _FailedError(Exception):
    """A failure that has been said."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 75 stopped, 78 configuration, 65 data, 1 else."""
    try:
        with _failures_said():
            arguments, settings = _parser().parse_known_args(argv)
            if settings and not arguments.takes_settings:
                _parser().error(f"unrecognized arguments: {' '.join(settings)}")
            arguments.settings = settings
            arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # while a full disk or a closed pipe can still be told
    except _FailedError as failed:
        _give_up_output()
        return failed.exit_code
    return 0


@contextmanager
def _failures_said() -> Iterator[None]:
    """Prints the line of an error that has one, and raises _FailedError instead."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        found = None if isinstance(error, _FailedError) else explained(error)
        if found is None:
            raise
        line, exit_code = found
        say_failure(line)
        raise _FailedError(exit_code) from error


def _give_up_output() -> None:
    """Drops what stdout cannot take, which the interpreter would try once more and complain about."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kandinsky-dist", description="Distributed training of the Kandinsky 2.2 prior and decoder."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_check(commands)
    _add_data(commands)
    _add_models(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_checkpoint(commands)
    _add_bench(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, **kwargs: Any) -> argparse.ArgumentParser:
    kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.set_defaults(run=run, takes_settings=False)
    return parser


def _group(commands: Any, name: str, summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=summary)
    return parser.add_subparsers(required=True, metavar="COMMAND")


def settings_help() -> str:
    """Every configuration key with its default and meaning."""
    lines = ["settings (--section.key value, or the same keys in a YAML file):"]
    for section, cls in SECTIONS.items():
        for item in cls.__dataclass_fields__.values():
            default = "null" if item.default is None else str(item.default)
            only = f" [{item.metadata['stage']} only]" if item.metadata["stage"] else ""
            lines.append(f"  {section}.{item.name} ({default}): {item.metadata['doc']}{only}")
    return "\n".join(lines)


def _add_configured(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        name,
        run,
        summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(loader.recipe_names())}\n\n{settings_help()}",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=True)
    parser.add_argument("stage", choices=STAGES, help="which of the two networks is trained")
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="recipe name or YAML file (default: defaults only)"
    )
    return parser


def _resolved(arguments: argparse.Namespace) -> loader.Resolved:
    layers = [launch_env.accelerate_layer(os.environ), loader.command_line_layer(arguments.settings)]
    return loader.load(arguments.stage, arguments.config, [layer for layer in layers if layer is not None])


def _add_train(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        resolved = _resolved(arguments)
        resolve.check(resolved, world_size=read_ranks(os.environ).world_size)
        from kandinsky_dist.faults.preempt import StopRequest

        with StopRequest().listening() as stop:
            from kandinsky_dist.runtime.process import joined
            from kandinsky_dist.train.trainer import Trainer

            # Said before the group is left: that may have to wait for ranks that wait for this one.
            with joined() as process, _failures_said():
                Trainer(resolved, process, stop).run()

    _add_configured(commands, "train", run, "Trains a stage; the same command again continues it.")


def _add_check(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        resolved = _resolved(arguments)
        resolve.check(resolved, world_size=arguments.world_size)
        print(resolved.to_yaml(), end="")

    parser = _add_configured(
        commands,
        "check",
        run,
        "Validates a configuration, without torch, and prints it with the origin of each value.",
    )
    parser.add_argument(
        "--world-size", type=int, default=1, help="ranks the batch is divided over (default: 1)"
    )


def _add_data(commands: Any) -> None:
    group = _group(commands, "data", "Makes, indexes and packs tar shards.")

    def demo(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.corpus import build_demo

        build_demo(arguments.out, image_size=arguments.image_size, max_samples=arguments.max_samples)

    parser = _command(
        group, "demo", demo, "Builds the demo corpus: OUT/train and OUT/validation (needs npm)."
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--image-size", type=int, default=128, help="side of the pictures, pixels")
    parser.add_argument("--max-samples", type=int, help="an even subset of so many samples")

    def pack(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.pack import pack

        pack(
            arguments.source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            image_column=arguments.image_column,
            caption_column=arguments.caption_column,
        )

    parser = _command(
        group, "pack", pack, "Packs a folder of images and captions into tar shards with a manifest."
    )
    parser.add_argument(
        "source", type=Path, help="folder with metadata.jsonl or .csv, or with sidecar .txt captions"
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples a tar")
    parser.add_argument("--image-column", help="metadata's column of image paths (None: file_name or image)")
    parser.add_argument("--caption-column", default="text", help="metadata's column of captions")

    def index(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.index import index_shards

        manifest = index_shards(arguments.shards, num_processes=arguments.num_processes)
        print(
            f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards, "
            f"fingerprint {manifest.fingerprint[:16]}"
        )

    parser = _command(
        group, "index", index, "Writes the manifest of existing shards; started again it continues."
    )
    parser.add_argument("shards", help="folder, glob, brace pattern or list file (.txt)")
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1, help="readers side by side")


def _add_models(commands: Any) -> None:
    group = _group(commands, "models", "Makes networks to start from.")

    def init(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.models.init import initialise

        images = None
        if arguments.clip_statistics:
            from kandinsky_dist.data.sampling import first_pictures

            images = first_pictures(arguments.clip_statistics, num_samples=512, side=224, batch_size=64)
        is_new = initialise(
            arguments.size, arguments.out, seed=arguments.seed, tokenizer=arguments.tokenizer, images=images
        )
        if not is_new:
            say(
                f"{arguments.out} holds {arguments.size} networks of seed {arguments.seed}: kept, "
                "statistics included; remove it to make them anew"
            )

    parser = _command(
        group,
        "init",
        init,
        "Writes random weights as diffusers pipelines OUT/prior and OUT/decoder, real CLIP tokenizer.",
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="full: 1.03 B prior, 1.25 B decoder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--tokenizer", help="folder or hub name to copy the tokenizer from (default: by pip)")
    parser.add_argument(
        "--clip-statistics", metavar="SHARDS", help="measure clip_mean and clip_std on these shards"
    )


def _add_export(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.export import export

        export(arguments.checkpoint, arguments.out)

    parser = _command(
        commands, "export", run, "Writes a run's newest whole checkpoint as a diffusers pipeline folder."
    )
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="run folder, or one checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to make")


def _add_generate(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.models.pipeline import generate

        generate(
            arguments.prior,
            arguments.decoder,
            prompt=arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            out=arguments.output,
            size=arguments.size,
            num_prior_steps=arguments.num_prior_steps,
            num_decoder_steps=arguments.num_decoder_steps,
            guidance_scale=arguments.guidance_scale,
            seed=arguments.seed,
            device=arguments.device,
        )

    parser = _command(commands, "generate", run, "Makes an image for a prompt with exported pipelines.")
    parser.add_argument("--prior", required=True, help="prior pipeline: folder or hub name")
    parser.add_argument("--decoder", required=True, help="decoder pipeline: folder or hub name")
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--negative-prompt", default="", help="what to steer away from")
    parser.add_argument("--output", type=Path, default=Path("sample.png"), help="PNG to write")
    parser.add_argument("--size", type=int, default=512, help="side, pixels")
    parser.add_argument("--num-prior-steps", type=int, default=25, help="denoising steps of the prior")
    parser.add_argument("--num-decoder-steps", type=int, default=50, help="denoising steps of the decoder")
    parser.add_argument(
        "--guidance-scale", type=float, default=4.0, help="classifier-free guidance; 1 is none"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU where there is one)")


def _add_checkpoint(commands: Any) -> None:
    group = _group(commands, "checkpoint", "Says what a run has saved.")

    def list_(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.inspect import describe

        for line in describe(arguments.run_dir, is_deep=False):
            print(line)

    def verify(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.inspect import describe

        for line in describe(arguments.run_dir, is_deep=True):
            print(line)

    for name, run, summary in (
        ("list", list_, "Lists a run's checkpoints."),
        ("verify", verify, "Reads every byte of a run's checkpoints and compares it with what was written."),
    ):
        parser = _command(group, name, run, summary)
        parser.add_argument("run_dir", metavar="RUN", type=Path, help="run folder")


def _add_bench(commands: Any) -> None:
    group = _group(commands, "bench", "Measured tables: a JSON record and the table rendered from it.")

    def memory(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.bench.memory import run

        run(arguments.out, size=arguments.size, stages=arguments.stage, world_size=arguments.world_size)

    parser = _command(
        group,
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

    parser = _command(
        group, "render", render, "Prints the Markdown of a record that a bench case has written."
    )
    parser.add_argument("record", type=Path, help="JSON file")
