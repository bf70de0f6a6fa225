"""What `bench train` trains on where nothing is given: random networks, and photographs with captions."""

import hashlib
import json
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kandinsky_dist.bench.data_samples import key, photographs
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.data.manifest import MANIFEST_NAME
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.models.init import MARKER, initialise
from kandinsky_dist.models.token_lengths import token_counter

NUM_SHARDS = 4
NOT_OF_THE_CACHE = (
    "data.source",
    "data.num_workers",
    "data.micro_batch_size",
    "data.global_batch_size",
    "data.group_by_length",
)
CAPTION_TOKENS = (12, 25)
"""Shortest and longest caption, start and end token included: where most captions of photographs lie."""

DESCRIPTIONS = (
    "old", "small", "red", "quiet", "bright", "wooden", "distant", "wet", "golden", "broken", "tall", "green",
    "dusty", "warm", "empty", "white", "dark", "blue", "narrow", "wild",
)  # fmt: skip
THINGS = (
    "house", "bridge", "street", "garden", "river", "dog", "horse", "boat", "tower", "forest", "market",
    "cat", "mountain", "beach", "table", "chair", "window", "car", "train", "field", "bird", "church",
    "lake", "road",
)  # fmt: skip
PLACES = ("near", "behind", "under", "above", "beside", "with", "and", "at", "by", "in")


@dataclass(frozen=True)
class Shape:
    """What a size of networks is measured on where nothing else is asked for.

    Attributes:
        num_samples: of the corpus.
        photograph_size: side of its pictures, pixels.
        settings: of a stage's cases.
        num_micro: micro-batches of a rank in a step.
    """

    num_samples: int
    photograph_size: int
    settings: dict[Stage, dict[str, str]]
    num_micro: int = 1


def _settings(prior: int, decoder: int, resolution: int) -> dict[Stage, dict[str, str]]:
    return {
        "prior": {"data.micro_batch_size": str(prior)},
        "decoder": {"data.micro_batch_size": str(decoder), "data.resolution": str(resolution)},
    }


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(128, 256, _settings(16, 8, 64)),
    # Few samples, as a suite on 2 cores is to be a matter of minutes; the published resolution, at which
    # encoders and U-Net have their usual shares of a step.
    "small": Shape(32, 512, _settings(32, 1, 512)),
    # Two cases hold memory at once.
    "full": Shape(1024, 1024, _settings(64, 16, 512), num_micro=4),
}


def make_models(out: Path, size: Size, given: Path | None) -> Path:
    """A folder with prior/ and decoder/: the given one, or random networks in OUT, made once."""
    if given is not None:
        for name in ("prior", "decoder"):
            if not (given / name).is_dir():
                raise ConfigError(
                    f"--models {given} has no folder {name}: kandinsky-dist models init makes both"
                )
        return given
    folder = out / f"models_{size}"
    if size != "full":
        initialise(size, folder)
        return folder
    if (folder / MARKER).is_file():
        return folder
    # Half the bytes to read for networks that take minutes; they are trained in fp32 all the same. In a
    # process of its own: what it touches of the GPU's memory would be kept from the cases.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(initialise, size, folder, dtype=torch.bfloat16, device=device).result()
    return folder


def make_corpus(out: Path, size: Size, models: Path) -> Path:
    """Shards of JPEG photographs with captions of usual lengths in OUT, made once."""
    shape = SHAPES[size]
    count = token_counter(models / "prior")
    folder = out / f"corpus_{size}"
    write_shards(
        _samples(shape, captions(shape.num_samples)),
        folder,
        samples_per_shard=shape.num_samples // NUM_SHARDS,
        origin={
            "command": "bench train",
            "num_samples": shape.num_samples,
            "photograph_size": shape.photograph_size,
            "num_tokens": sum(count(captions(shape.num_samples))),
        },
    )
    return folder


def captions(num_samples: int) -> list[str]:
    """Sentences of made-up photographs, whose lengths are spread evenly over `CAPTION_TOKENS`.

    All words are one token to CLIP.
    """
    found = []
    for number in range(num_samples):
        draw = random.Random(number)
        shortest, longest = CAPTION_TOKENS
        num_words = draw.randint(shortest, longest) - 2  # start and end token
        words = ["a", "photo", "of"]
        while len(words) < num_words:
            words += ["a", draw.choice(DESCRIPTIONS), draw.choice(THINGS), draw.choice(PLACES)]
        found.append(" ".join(words[:num_words]))
    return found


def about_corpus(size: Size) -> dict[str, float]:
    """The corpus in figures, for a record."""
    shape = SHAPES[size]
    lengths = [len(text.split()) + 2 for text in captions(shape.num_samples)]
    return {
        "num_samples": shape.num_samples,
        "photograph_size": shape.photograph_size,
        "mean_caption_tokens": sum(lengths) / len(lengths),
        "longest_caption_tokens": max(lengths),
    }


def _samples(shape: Shape, texts: list[str]) -> Iterator[dict[str, Any]]:
    pictures = photographs(shape.num_samples, shape.photograph_size)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        yield {"__key__": key(number), "jpg": picture, "txt": text.encode()}


def cached_shards(out: Path, stage: Stage, settings: Mapping[str, str]) -> Path:
    """The shards of encoder outputs in OUT that `precompute` makes of the corpus, made once.

    Args:
        out: folder.
        stage: whose encoders.
        settings: of a case, places of data and models included.

    Raises:
        ConfigError: it failed.
    """
    mine = {
        name: value
        for name, value in sorted(settings.items())
        if name.startswith(("model.", "data.")) and name not in NOT_OF_THE_CACHE
    }
    text = json.dumps(mine)
    folder = out / f"cached_{stage}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if (folder / MANIFEST_NAME).is_file():  # written last: nothing is left to do, and no process to start
        return folder
    words = [f"--{name}={value}" for name, value in mine.items()]
    # In a process of its own: what encoders leave behind in this one would be inherited by nobody, but kept.
    command = [sys.executable, "-m", "kandinsky_dist", "precompute", stage, "--out", str(folder), *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"precompute {stage} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return folder
