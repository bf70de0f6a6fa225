"""Commands that make networks, write them out and draw with them."""

import argparse
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import SIZES, command, group
from kandinsky_dist.runtime.logs import say


def add_models(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "models", "Makes networks to start from.")

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

    parser = command(
        commands,
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


def add_export(commands: Any) -> None:
    """Adds the command."""

    def run(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.checkpoint.export import export

        say(export(arguments.checkpoint, arguments.out, ema=arguments.ema, pipeline=arguments.pipeline))

    parser = command(
        commands, "export", run, "Writes a run's newest whole checkpoint as a diffusers pipeline folder."
    )
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="run folder, or one checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--ema",
        metavar="DECAY",
        help="average of the weights to take, by its decay; none: the weights as trained (default: that "
        "with the largest decay, and the weights where there is none)",
    )
    parser.add_argument(
        "--pipeline",
        metavar="NAME_OR_FOLDER",
        help="pipeline that the weights are put into (default: the one that the run started from)",
    )


def add_generate(commands: Any) -> None:
    """Adds the command."""

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

    parser = command(commands, "generate", run, "Makes an image for a prompt with exported pipelines.")
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
