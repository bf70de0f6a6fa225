"""What a corpus of encoder outputs says of itself: cache.json beside its manifest."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky_dist.data.aspects import NUM_ASPECTS, WHOLE, view_size
from kandinsky_dist.data.locations import is_remote, join
from kandinsky_dist.data.patterns import resolve_shards, shown
from kandinsky_dist.data.record_layout import RecordLayout
from kandinsky_dist.data.rows import SIZE_MULTIPLE
from kandinsky_dist.errors import ConfigError, DataError

CACHE_NAME = "cache.json"
LAYOUT_VERSION = 1
"""Of the records: another one is not read."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MAX_TEXT_STATES = 77
REMEDY = "kandinsky-dist precompute"


@dataclass(frozen=True)
class CacheDescription:
    """How encoder outputs were made and how they lie in their records.

    Attributes:
        settings: what a run must share with them: encoders, views, captions.
        dtype: "fp16" or "bf16".
        has_flips: whether the mirrored images' outputs are there too.
        widths: of "image_embeds" and, for the prior, "text_embeds" and "text_states"; for the decoder,
            channels of "latents" and "pixels" of a side that become one latent.
        constants: outputs that belong to no sample, on the CPU: the prior's "text_embeds" (D) and
            "text_states" (L, D) of the empty caption, the decoder's "image_embeds" (D) of a zero image.
        notes: what else is worth knowing: precision of the encoders, measured error.
    """

    settings: Mapping[str, Any]
    dtype: str
    has_flips: bool
    widths: Mapping[str, int]
    constants: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def layouts(self) -> Mapping[int, RecordLayout]:
        """Layout of the records by aspect bucket, with those that places of their order can have."""
        dtype, num_views = DTYPES[self.dtype], 2 if self.has_flips else 1
        image = {"image_embeds": (num_views, self.widths["image_embeds"])}
        if self.settings["stage"] == "prior":
            shapes = {**image, "text_embeds": (self.widths["text_embeds"],)}
            rows = "text_states", self.widths["text_states"]
            return {WHOLE: RecordLayout(dtype, shapes, rows, MAX_TEXT_STATES)}
        buckets = range(NUM_ASPECTS) if self.settings["data.aspect_buckets"] else [WHOLE]
        return {
            aspect: RecordLayout(dtype, {**image, "latents": (num_views, *self.latent_shape(aspect))})
            for aspect in buckets
        }

    def latent_shape(self, aspect: int = WHOLE) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        height, width = view_size(aspect, self.settings["data.resolution"], SIZE_MULTIPLE)
        return self.widths["latents"], height // self.widths["pixels"], width // self.widths["pixels"]

    def to_json(self) -> str:
        """For people and for `of_json`."""
        constants = {
            name: {
                "shape": list(tensor.shape),
                "base64": base64.b64encode(tensor.contiguous().view(torch.uint8).numpy().tobytes()).decode(),
            }
            for name, tensor in self.constants.items()
        }
        content = {
            "layout_version": LAYOUT_VERSION,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "has_flips": self.has_flips,
            "widths": dict(self.widths),
            "notes": dict(self.notes),
            "constants": constants,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str, problem: str) -> "CacheDescription":
        """Reads what `to_json` gave.

        Args:
            text: content of the file.
            problem: what names it, for messages.

        Raises:
            ConfigError: of another version, or damaged.
        """
        try:
            content = json.loads(text)
            version = content["layout_version"]
            if version != LAYOUT_VERSION:
                raise ConfigError(
                    f"{problem} has records of layout {version}, this program reads layout {LAYOUT_VERSION}; "
                    f"make them again: {REMEDY}"
                )
            dtype = DTYPES[content["dtype"]]
            return cls(
                content["settings"],
                content["dtype"],
                content["has_flips"],
                content["widths"],
                {name: _tensor(item, dtype) for name, item in content["constants"].items()},
                content["notes"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"{problem} has a damaged {CACHE_NAME} ({error}); {REMEDY} makes it") from error

    def check(self, wanted: Mapping[str, Any], problem: str, *, horizontal_flip: float) -> None:
        """Makes sure that a run with these settings may take these outputs for its encoders'.

        Raises:
            ConfigError: it may not.
        """
        for name in {**self.settings, **wanted}:
            found, needed = (_plain(item.get(name)) for item in (self.settings, wanted))
            if found != needed:
                raise ConfigError(
                    f"{problem} was precomputed with {name}={found}, this run has {needed}: precompute the "
                    "shards again, or change the run"
                )
        if horizontal_flip and not self.has_flips:
            raise ConfigError(
                f"data.horizontal_flip={horizontal_flip} needs mirrored images, and {problem} was "
                f"precomputed without: {REMEDY} --flip"
            )


def read_description(shards: str, key: str) -> CacheDescription:
    """The description of a corpus of encoder outputs.

    Args:
        shards: as data.shards: a folder or its URL; of other tars, the folder of the first.
        key: the setting that named it, for messages.

    Raises:
        ConfigError: there is none, so these are no encoder outputs; or it cannot be used.
    """
    problem, content = f"{key}={shown(shards)}", description_content(shards, key)
    if content is None:
        raise ConfigError(
            f"{problem} has no {CACHE_NAME}: these are no encoder outputs; make some with {REMEDY}, or train "
            "with data.source=raw"
        )
    return CacheDescription.of_json(content.decode("utf-8", "replace"), problem)


def description_content(shards: str, key: str) -> bytes | None:
    """The file that describes a corpus of encoder outputs, None for another one; see `read_description`."""
    if is_remote(shards):
        from kandinsky_dist.data.remote.fetch import fetch_whole
        from kandinsky_dist.data.remote.transports import MissingObjectError

        try:
            return fetch_whole(join(shards.rstrip("/"), CACHE_NAME))
        except MissingObjectError:
            return None
    folder = Path(shards) if Path(shards).is_dir() else Path(resolve_shards(shards, key)[0]).parent
    try:
        return (folder / CACHE_NAME).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{folder / CACHE_NAME} cannot be read: {error.strerror}") from error


def _tensor(item: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    data = np.frombuffer(base64.b64decode(item["base64"]), np.uint8).copy()
    return torch.from_numpy(data).view(dtype).reshape(item["shape"])


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))
