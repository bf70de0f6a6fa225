"""What loaders are compared as: how each stores the samples, and how it makes batches of them.

Letters of shapes: B samples.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kandinsky_dist.bench.data_samples import (
    CLIP_SIZE,
    EMBEDDING_D,
    LATENTS_CHW,
    NUM_LATENTS,
    NUM_VALUES,
    RESOLUTION,
    encoder_outputs,
    key,
    photographs,
)
from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.record_layout import RecordLayout, Sheet
from kandinsky_dist.data.record_slots import SlotFinder
from kandinsky_dist.data.records import Check, RecordReader
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.storage import LocalStorage

Form = Literal["cached", "jpeg"]
Batches = Iterator[tuple[Tensor, Tensor]]
"""Endless. Cached: latents (B, 4, 64, 64) and embeddings (B, 1280), fp16. JPEG: both views of the images."""

FORMS: tuple[Form, ...] = ("cached", "jpeg")
RECORD = RecordLayout(torch.float16, {"latents": LATENTS_CHW, "image_embeds": (EMBEDDING_D,)})
SHARDS_PER_CORPUS = 16
"""Enough for every worker and shuffle to have some."""


@dataclass(frozen=True)
class Layout:
    """A way to store samples: writes so many of a form into a folder that is not there yet."""

    name: str
    form: Form
    write: Callable[[Path, int], None]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contender:
    """A way to read samples.

    Attributes:
        name: of its rows.
        layout: what it reads.
        batches: endless batches of a folder, by batch size and number of workers.
        workers: the numbers of worker processes (of threads, where it says so) that it is measured with.
        needs: packages, as imported, that must be there.
        install: what pip installs for them.
    """

    name: str
    layout: Layout
    batches: Callable[[Path, int, int], Batches]
    workers: tuple[int, ...] = (0,)
    install: str = ""

    @property
    def form(self) -> Form:
        """What it reads."""
        return self.layout.form

    def is_installed(self) -> bool:
        """Whether what it needs can be imported."""
        return all(_is_there(package) for package in self.layout.needs)


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False


def split(values_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and embeddings of flat fp16 samples; nothing is copied."""
    return (
        values_BN[:, :NUM_LATENTS].view(-1, *LATENTS_CHW),
        values_BN[:, NUM_LATENTS:NUM_VALUES],
    )


def pil_processor_class() -> Any:
    """CLIPImageProcessor as it works on Pillow images, under the name that transformers gives it."""
    import transformers

    names = ("CLIPImageProcessorPil", "CLIPImageProcessor")  # as it is called where torchvision is optional
    return next(getattr(transformers, name) for name in names if hasattr(transformers, name))


@cache
def _clip_processor() -> Any:
    size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    return pil_processor_class()(crop_size=size, size={"shortest_edge": CLIP_SIZE})


def usual_square(image: Image.Image, resolution: int) -> Tensor:
    """The middle of a picture, by Pillow: fp32 (3, resolution, resolution) in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=1)
    pixels_HWC = np.asarray(image, np.float32) / 127.5 - 1
    return torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy())


def usual_views(data: bytes) -> tuple[Tensor, Tensor]:
    """Both views as training scripts make them, by Pillow and CLIPImageProcessor; fp32."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    clip_CHW = torch.as_tensor(_clip_processor()(image, return_tensors="np").pixel_values[0])
    return clip_CHW, usual_square(image, RESOLUTION)


def _write_record_shards(folder: Path, num_samples: int) -> None:
    samples = (
        {"__key__": key(number), "cached": RECORD.records(_parts(values))[0]}
        for number, values in enumerate(encoder_outputs(num_samples))
    )
    _write(folder, num_samples, samples)


def _parts(values: npt.NDArray[np.float16]) -> dict[str, Tensor]:
    latents_BCHW, embeds_BD = split(torch.from_numpy(values)[None])
    return {"latents": latents_BCHW, "image_embeds": embeds_BD}


def _write_jpeg_shards(folder: Path, num_samples: int) -> None:
    samples = (
        {"__key__": key(number), "jpg": data, "txt": b"a photograph"}
        for number, data in enumerate(photographs(num_samples))
    )
    _write(folder, num_samples, samples)


def _write(folder: Path, num_samples: int, samples: Iterator[dict[str, Any]]) -> None:
    write_shards(samples, folder, samples_per_shard=-(-num_samples // SHARDS_PER_CORPUS), origin={})


RECORD_SHARDS = Layout("shards of records", "cached", _write_record_shards)
JPEG_SHARDS = Layout("shards of photographs", "jpeg", _write_jpeg_shards)


def _order(folder: str | Path) -> Order:
    return Order([read_manifest(str(folder))], seed=0)


def _records(check: Check, folder: Path, batch_size: int, num_threads: int) -> Batches:
    reader = RecordReader(_order(folder), {WHOLE: RECORD}, check=check)
    for batch in reader.batches(_endless(batch_size), num_threads=num_threads):
        yield batch.tensors["latents"], batch.tensors["image_embeds"]


def _endless(batch_size: int) -> Iterator[range]:
    first = 0
    while True:
        yield range(first, first + batch_size)
        first += batch_size


def _bare_pread(num_batches_held: int, folder: Path, batch_size: int, _: int) -> Batches:
    """The reads alone: the same bytes in the same order, places known in advance, into some batches' memory.

    A single one's stays in the caches, but is overwritten while whoever asked for it may still use it.
    """
    order = _order(folder)
    finder = SlotFinder(order.manifest, "cached")
    num_batches = order.num_samples // batch_size
    epoch = [
        finder.find(order.locate(np.arange(first, first + batch_size)))
        for first in range(0, num_batches * batch_size, batch_size)
    ]
    plans = [list(zip(slots.descriptors(), slots.offsets_B.tolist(), strict=True)) for slots in epoch]
    sheets = [Sheet(RECORD, np.zeros(batch_size, np.int64)) for _ in range(num_batches_held)]
    memory = cycle([(sheet.tensors, sheet.buffers()) for sheet in sheets])
    for plan, (tensors, rows) in zip(cycle(plans), memory, strict=False):  # both endless
        for row, (descriptor, offset) in zip(rows, plan, strict=True):
            os.preadv(descriptor, row, offset)
        yield tensors["latents"], tensors["image_embeds"]


def training_batches(
    location: str | Path, batch_size: int, num_workers: int, *, read_ahead_bytes: int = 0
) -> Batches:
    """The training loader itself, on a shard folder or its URL."""
    order = _order(location)
    views = Views(clip_size=CLIP_SIZE, resolution=RESOLUTION, tokenize=None, captions=None, seed=0)
    storage = make_storage(order.manifest, read_ahead_bytes=read_ahead_bytes, cache_dir=None, cache_bytes=0)
    loader = Loader(
        ShardDataset(order, views, storage),
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        device="cpu",
    )
    for (batch,) in loader.steps(0):
        assert batch.clip_pixels_BCHW is not None
        assert batch.pixels_BCHW is not None
        yield batch.clip_pixels_BCHW, batch.pixels_BCHW


def _files(folder: Path) -> Iterator[bytes]:
    """The photographs' bytes, again and again."""
    order = _order(folder)
    storage = LocalStorage(order.manifest)
    places = order.locate(np.arange(min(64, order.num_samples))).each()
    files = [storage.read(place, ("jpg",)).members["jpg"] for place in places]
    while True:
        yield from files


def _bare_decode(folder: Path, batch_size: int, _: int) -> Batches:
    """Pillow's decoder alone, of files that are in memory; nothing is resized or kept."""
    clip_BCHW = torch.zeros(batch_size, 3, CLIP_SIZE, CLIP_SIZE, dtype=torch.uint8)
    pixels_BCHW = torch.zeros(batch_size, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    files = _files(folder)
    while True:
        for _row in range(batch_size):
            Image.open(io.BytesIO(next(files))).load()
        yield clip_BCHW, pixels_BCHW


def _usual_loop(folder: Path, batch_size: int, _: int) -> Batches:
    """The usual way to make both views, of files that are in memory."""
    files = _files(folder)
    while True:
        clip, pixels = zip(*(usual_views(next(files)) for _row in range(batch_size)), strict=True)
        yield torch.stack(clip), torch.stack(pixels)


OURS = "kandinsky-dist"
BARE_PREAD = "bare pread"
BARE_PREAD_HELD = "bare pread, a batch held"
BARE_DECODE = "bare Pillow decode"
USUAL_LOOP = "PIL + CLIPImageProcessor"

OWN = (
    Contender(BARE_PREAD, RECORD_SHARDS, partial(_bare_pread, 1)),
    Contender(BARE_PREAD_HELD, RECORD_SHARDS, partial(_bare_pread, 2)),
    Contender(f"{OURS}, sealed records", RECORD_SHARDS, partial(_records, "seal"), (0, 1, 2)),
    Contender(f"{OURS}, CRC-32", RECORD_SHARDS, partial(_records, "crc32"), (0, 1, 2)),
    Contender(f"{OURS}, unchecked", RECORD_SHARDS, partial(_records, "none"), (0, 1, 2)),
    Contender(BARE_DECODE, JPEG_SHARDS, _bare_decode),
    Contender(USUAL_LOOP, JPEG_SHARDS, _usual_loop),
    Contender(OURS, JPEG_SHARDS, training_batches, (0, 1, 2)),
)
