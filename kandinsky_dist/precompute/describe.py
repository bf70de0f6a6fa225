"""The description of a corpus of encoder outputs, with what half precision costs, measured on a batch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.data.cache_description import CACHE_NAME, DTYPES, CacheDescription
from kandinsky_dist.data.record_layout import WORD_BYTES
from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.precompute.batches import ShardReader
from kandinsky_dist.precompute.encoders import Encoders
from kandinsky_dist.precompute.shard import check_finite, on_device, without_padding


@dataclass(frozen=True)
class Request:
    """What a command asks for: a corpus that exists already must be its result.

    Attributes:
        settings: see `CacheDescription`.
        dtype, has_flips: likewise.
        precision: that the encoders run in.
        corpus: fingerprint of the manifest that is read.
    """

    settings: Mapping[str, Any]
    dtype: str
    has_flips: bool
    precision: str
    corpus: str

    @property
    def id(self) -> str:
        """Another one for another request."""
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()[:16]

    def check(self, found: CacheDescription, out: str) -> None:
        """Makes sure that a description is of what was asked for.

        Raises:
            ConfigError: it is not.
        """
        notes = found.notes
        other = Request(found.settings, found.dtype, found.has_flips, notes["precision"], notes["corpus"])
        mine, its = self._facts(), other._facts()
        for name in {**mine, **its}:
            if mine.get(name) != its.get(name):
                raise ConfigError(
                    f"--out {out} holds encoder outputs with {name}={its.get(name)}, this command asks for "
                    f"{mine.get(name)}: choose another folder or remove it"
                )

    def _facts(self) -> dict[str, Any]:
        facts = {
            **self.settings,
            "--dtype": self.dtype,
            "--flip": self.has_flips,
            "parallel.precision": self.precision,
            "data.shards of fingerprint": self.corpus[:16],
        }
        found: dict[str, Any] = json.loads(json.dumps(facts))
        return found


def describe(
    request: Request,
    encoders: Encoders,
    exact: Encoders,
    reader: ShardReader,
    num_samples: list[int],
    device: torch.device,
) -> CacheDescription:
    """Describes the outputs of encoders.

    Args:
        request: what is asked for.
        encoders: in their precision.
        exact: the same in fp32.
        reader: of the corpus.
        num_samples: of each of its shards.
        device: of the encoders.

    Raises:
        ConfigError: outputs of a width, or values, that the records do not have.
        DataError: no sample can be used.
    """
    dtype, widths = DTYPES[request.dtype], encoders.widths()
    for name, width in widths.items():
        if name.endswith(("embeds", "states")) and width * dtype.itemsize % WORD_BYTES:
            divisor = WORD_BYTES // dtype.itemsize
            raise ConfigError(f"{name} of width {width} cannot be kept: {divisor} must divide it")
    constants = {name: tensor.to("cpu", dtype) for name, tensor in encoders.constants().items()}
    notes = {
        "precision": request.precision,
        "corpus": request.corpus,
        "error": _measured(encoders, exact, reader, num_samples, dtype, device),
    }
    return CacheDescription(request.settings, request.dtype, request.has_flips, widths, constants, notes)


def _measured(
    encoders: Encoders,
    exact: Encoders,
    reader: ShardReader,
    num_samples: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """How far outputs as they are kept are from those in fp32, on the first usable batch."""
    for shard, num in enumerate(num_samples):
        batches = reader.batches(shard, reader.samples(shard)) if num else iter(())
        for decoded in batches:
            if decoded.batch is None:
                continue
            batch, num_rows = without_padding(decoded.batch)
            batch = on_device(batch, device)
            kept = {name: tensor.to("cpu", dtype) for name, tensor in encoders(batch).items()}
            check_finite(kept)
            wanted = {name: tensor.to("cpu", torch.float32) for name, tensor in exact(batch).items()}
            found: dict[str, Any] = {"samples": len(batch)}
            for name, tensor in kept.items():
                if name == "text_states" and num_rows is not None:  # those of the captions alone are kept
                    tensor, wanted[name] = (_valid(item, num_rows) for item in (tensor, wanted[name]))
                found[name] = _error(tensor, wanted[name])
            return found
    raise DataError(f"no sample of the corpus can be used, so there is nothing to keep in {CACHE_NAME}")


def _valid(states_BLD: Tensor, num_rows: list[int]) -> Tensor:
    return torch.cat([states_LD[:num] for states_LD, num in zip(states_BLD, num_rows, strict=True)])


def _error(kept: Tensor, wanted: Tensor) -> dict[str, float]:
    difference = kept.to(torch.float32) - wanted
    return {
        "largest": difference.abs().max().item(),
        "largest_value": wanted.abs().max().item(),
        "relative_rms": (difference.square().mean() / wanted.square().mean()).sqrt().item(),
    }
