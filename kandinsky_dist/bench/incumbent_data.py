"""The baseline's data: Pillow, CLIPImageProcessor and CLIPTokenizer in the training process.

Shapes: B samples, L tokens, C channels, H and W pixels.
"""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kandinsky_dist.bench.data_contenders import pil_processor_class, usual_square
from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.captions import Captions, CaptionSource
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.shard_index import IMAGE_EXTENSIONS
from kandinsky_dist.models.architectures import MAX_TOKENS
from kandinsky_dist.train.corpora import training_order

GIB = 2**30
NUM_POSITIONS = 10**9
"""As good as endless: a bench is over long before."""


class Samples(Dataset):
    """Position of the run's order -> picture and caption of the sample there."""

    def __init__(self, config: Config) -> None:
        order = training_order(config)
        assert order is not None
        self._order: Order = order
        self._storage = make_storage(
            order.manifest,
            read_ahead_bytes=0,
            cache_dir=None if config.data.cache_dir is None else Path(config.data.cache_dir),
            cache_bytes=int(config.data.cache_gib * GIB),
        )
        sources = tuple(CaptionSource.parse(source) for source in config.data.captions)
        self._captions = Captions(sources, config.run.seed) if config.stage == "prior" else None
        self._extensions = frozenset(
            (*IMAGE_EXTENSIONS, *(self._captions.extensions if self._captions else ()))
        )

    def __len__(self) -> int:
        return NUM_POSITIONS

    def __getitem__(self, position: int) -> tuple[int, Image.Image, str]:
        (place,) = self._order.locate([position]).each()
        sample = self._storage.read(place, self._extensions)
        name = self._order.manifest.name(place.shard, sample.key)
        data = next(sample.members[kind] for kind in IMAGE_EXTENSIONS if kind in sample.members)
        caption = self._captions.choose(sample.members, position, name) if self._captions else ""
        return position, Image.open(io.BytesIO(data)).convert("RGB"), caption


class Collate:
    """Samples to the tensors that a stage's step reads, fp32 on the CPU."""

    def __init__(self, config: Config) -> None:
        from transformers import CLIPTokenizer

        folder = Path(config.model.prior)
        self._processor = pil_processor_class().from_pretrained(folder, subfolder="image_processor")
        self._resolution = None if config.stage == "prior" else config.data.resolution
        self._tokenizer: Any = (
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer") if config.stage == "prior" else None
        )

    def __call__(self, samples: list[tuple[int, Image.Image, str]]) -> dict[str, Tensor]:
        """A micro-batch."""
        positions, images, captions = zip(*samples, strict=True)
        batch = {
            "positions_B": torch.tensor(positions),
            "clip_BCHW": self._processor(list(images), return_tensors="pt").pixel_values,
        }
        if self._resolution is not None:
            views = [usual_square(image, self._resolution) for image in images]
            return {**batch, "pixels_BCHW": torch.stack(views)}
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {**batch, "tokens_BL": tokens.input_ids, "mask_BL": tokens.attention_mask.bool()}
