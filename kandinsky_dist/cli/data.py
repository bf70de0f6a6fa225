"""Commands that make, index, look at and pack shards."""

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from kandinsky_dist.cli.arguments import command, group
from kandinsky_dist.errors import DataError


def add_data(commands: Any) -> None:
    """Adds the commands."""
    commands = group(commands, "data", "Makes, indexes and packs tar shards.")

    def demo(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.packing.corpus import build_demo

        build_demo(arguments.out, image_size=arguments.image_size, max_samples=arguments.max_samples)

    parser = command(
        commands, "demo", demo, "Builds the demo corpus: OUT/train and OUT/validation (needs npm)."
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--image-size", type=int, default=128, help="side of the pictures, pixels")
    parser.add_argument("--max-samples", type=int, help="an even subset of so many samples")

    def pack(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.packing.pack import Columns, pack

        pack(
            arguments.source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            columns=Columns(arguments.image_column, arguments.caption_column, tuple(arguments.keep_columns)),
            split=arguments.split,
            subset=arguments.subset,
        )

    parser = command(
        commands,
        "pack",
        pack,
        "Packs images and captions into tar shards with a manifest; the images' bytes stay as they are.",
    )
    parser.add_argument(
        "source",
        help="folder with metadata.jsonl or .csv; folder of images beside .txt captions (and .json); folder "
        "saved by `datasets`; .parquet file or folder of them; OWNER/NAME on the Hugging Face hub",
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples a tar")
    parser.add_argument(
        "--image-column", help="column of images or their paths (None: file_name, image, jpg, ...)"
    )
    parser.add_argument("--caption-column", help="column of captions (None: text or caption)")
    parser.add_argument(
        "--keep-columns",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns that go into a .json member of each sample",
    )
    parser.add_argument("--split", help="of a dataset that has several")
    parser.add_argument("--subset", help="configuration of a hub dataset that has several")

    def index(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.indexing.index import index_shards

        manifest = index_shards(
            arguments.shards,
            out=arguments.out,
            captions=tuple(arguments.captions),
            checksums=arguments.checksums,
            skip_damaged=arguments.skip_damaged,
            num_processes=arguments.num_processes,
        )
        print(
            f"{manifest.num_samples:,} samples in {len(manifest):,} shards, "
            f"fingerprint {manifest.fingerprint[:16]}"
        )

    parser = command(
        commands, "index", index, "Writes the manifest of existing shards; started again it continues."
    )
    parser.add_argument(
        "shards", help="folder, glob, brace pattern, list file (.txt), URLs or s3://BUCKET/PREFIX/"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the index of shards that are read-only or remote"
    )
    parser.add_argument(
        "--captions", nargs="+", default=["txt"], metavar="EXT", help="extensions of which a sample needs one"
    )
    parser.add_argument(
        "--checksums", action="store_true", help="read every byte and note CRC-32s (remote shards: always)"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave damaged shards out instead of refusing them"
    )
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1, help="readers side by side")

    def subset(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.indexing.subset import Filters, make_subset

        filters = {item.name: getattr(arguments, item.name) for item in fields(Filters)}
        manifest = make_subset(arguments.shards, arguments.out, **filters)
        print(
            f"{manifest.num_samples:,} samples in {(manifest.num_samples_S > 0).sum():,} of "
            f"{len(manifest):,} shards, fingerprint {manifest.fingerprint[:16]}"
        )

    parser = command(
        commands,
        "subset",
        subset,
        "Writes a manifest of some samples of indexed shards; the shards stay where they are.",
    )
    parser.add_argument("shards", help="as data.shards: a folder with a manifest, or indexed local tars")
    parser.add_argument("out", type=Path, help="folder to make: give it as data.shards")
    parser.add_argument("--min-side", type=int, help="shorter side of the image, pixels")
    parser.add_argument("--min-pixels", type=int, help="width times height, pixels")
    parser.add_argument("--min-aspect", type=float, help="width over height")
    parser.add_argument("--max-aspect", type=float, help="width over height")
    parser.add_argument("--min-caption-length", type=int, help="size of the .txt, bytes of UTF-8")
    parser.add_argument("--max-caption-length", type=int, help="size of the .txt, bytes of UTF-8")
    parser.add_argument(
        "--caption-matches",
        metavar="REGEX",
        help="found somewhere in the .txt: reads all captions (local tars)",
    )
    parser.add_argument("--limit", type=int, help="the first so many samples that fit")

    def check(arguments: argparse.Namespace) -> None:
        from kandinsky_dist.data.checking.report import check_shards
        from kandinsky_dist.data.checking.report_text import tables_of, to_text

        count_tokens = None
        if arguments.tokenizer is not None:
            from kandinsky_dist.models.token_lengths import token_counter

            count_tokens = token_counter(arguments.tokenizer)
        report = check_shards(
            arguments.shards,
            num_read=None if arguments.decode_all else arguments.sample,
            resolution=arguments.resolution,
            captions=arguments.captions,
            count_tokens=count_tokens,
            num_processes=arguments.num_processes,
            out=arguments.out,
        )
        print(to_text(tables_of(report.figures())), end="")
        if report.problem:
            raise DataError(report.problem)

    parser = command(
        commands,
        "check",
        check,
        "Says what a corpus consists of and whether it can be read: looks at the index of all samples, reads "
        "and decodes some as training does. Ends with 65 if something is damaged.",
    )
    parser.add_argument(
        "shards", help="as data.shards: a folder or URL with a manifest, or indexed local tars"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=int, default=1000, help="samples to decode, evenly spread")
    amount.add_argument("--decode-all", action="store_true", help="decode every sample")
    parser.add_argument("--resolution", type=int, default=512, help="side of the training view, pixels")
    parser.add_argument(
        "--captions", nargs="+", default=["txt"], metavar="SOURCE", help="sources as in data.captions"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a CLIP tokenizer or pipeline: counts the captions' tokens"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for report.json, report.md, report.png and unreadable.jsonl"
    )
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1, help="readers side by side")
