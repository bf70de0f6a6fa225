"""Which of a sample's captions is trained on: the sources by weight, chosen by position alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kandinsky_dist.errors import ConfigError, SampleError
from kandinsky_dist.runtime.hashing import Stream, uniform


@dataclass(frozen=True)
class CaptionSource:
    """A member of a sample, or a field of its JSON member, and how often it is taken.

    Attributes:
        extension: of the member.
        field: of the JSON object, text or a list of texts; None takes the member's own text.
        weight: against the other sources that a sample has.
    """

    extension: str
    field: str | None
    weight: float

    @classmethod
    def parse(cls, text: str) -> "CaptionSource":
        """Reads EXTENSION[.FIELD][=WEIGHT], as in "txt", "json.caption" or "json.tags=0.3".

        Raises:
            ConfigError: another form.
        """
        name, _, weight = text.partition("=")
        extension, _, field = name.strip().partition(".")
        try:
            source = cls(extension.lower(), field or None, float(weight or 1.0))
        except ValueError:
            source = cls("", None, 0.0)
        if not source.extension or not 0 < source.weight < float("inf"):
            raise ConfigError(
                f"data.captions has {text!r}; a source is EXTENSION or json.FIELD, =WEIGHT above 0 if not 1"
            )
        return source


@dataclass(frozen=True)
class Captions:
    """The choice among a sample's captions."""

    sources: tuple[CaptionSource, ...]
    seed: int

    @property
    def extensions(self) -> frozenset[str]:
        """Members that hold captions."""
        return frozenset(source.extension for source in self.sources)

    def choose(self, members: Mapping[str, bytes], position: int, name: str) -> str:
        """The caption of the sample at a position; what it lacks is not chosen.

        Raises:
            SampleError: it has none, or one that cannot be read.
        """
        found = [(source, texts) for source in self.sources if (texts := _texts(source, members, name))]
        if not found:
            wanted = ", ".join(_written(source) for source in self.sources)
            raise SampleError(f"{name}: has no caption in {wanted}")
        ends = np.cumsum([source.weight for source, _ in found])
        chosen = int(np.searchsorted(ends, self._draw(Stream.CAPTION_CHOICE, position) * ends[-1], "right"))
        texts = found[chosen][1]
        return texts[int(self._draw(Stream.CAPTION_ENTRY, position) * len(texts))]

    def _draw(self, stream: Stream, position: int) -> float:
        return float(uniform(self.seed, stream, position))


@dataclass(frozen=True)
class SoleCaption(Captions):
    """The caption of samples that have no choice, whatever their position."""

    def choose(self, members: Mapping[str, bytes], position: int, name: str) -> str:
        """The only caption of a sample.

        Raises:
            SampleError: it has none, or one that cannot be read.
            ConfigError: it has several.
        """
        (source,) = self.sources
        texts = _texts(source, members, name)
        if not texts:
            raise SampleError(f"{name}: has no caption in {_written(source)}")
        if len(texts) > 1:
            raise ConfigError(
                f"{name}: has {len(texts)} captions in {_written(source)}, and encoder outputs are kept of "
                "one: name a source with one in data.captions, or train with data.source=raw"
            )
        return texts[0]


def dropped(captions: Sequence[str], positions_B: npt.NDArray, *, share: float, seed: int) -> list[str]:
    """Captions of which a share, chosen by position alone, is replaced by ""."""
    drops_B = caption_drops(positions_B, share=share, seed=seed)
    return ["" if drop else caption for drop, caption in zip(drops_B, captions, strict=True)]


def caption_drops(positions_B: npt.NDArray, *, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """At which positions the caption is replaced by ""."""
    return uniform(seed, Stream.CAPTION_DROPOUT, positions_B) < share


def _texts(source: CaptionSource, members: Mapping[str, bytes], name: str) -> list[str]:
    """What a source offers, perhaps nothing; blank texts count as nothing in a JSON field."""
    if source.extension not in members:
        return []
    data = members[source.extension]
    if source.field is None:
        try:
            return [data.decode("utf-8").strip()]
        except UnicodeDecodeError as error:
            raise SampleError(
                f"{name}: its .{source.extension} is not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{name}: its .{source.extension} is not JSON ({error})") from None
    value = value.get(source.field) if isinstance(value, dict) else None
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _written(source: CaptionSource) -> str:
    return f".{source.extension}" + (f" field {source.field}" if source.field else "")
