"""One shard of images and captions -> one shard of encoder outputs, whole or not there.

The tar is written under a name of its own and renamed; its index, written last, says that the shard is done.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch
import webdataset
from torch import Tensor

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.cache_description import DTYPES, CacheDescription
from kandinsky_dist.data.indexing.samples import group_samples
from kandinsky_dist.data.indexing.tar_readers import open_reader
from kandinsky_dist.data.indexing.tarwalk import walk_tar
from kandinsky_dist.data.record_layout import RecordLayout
from kandinsky_dist.data.records import RECORD_EXTENSION
from kandinsky_dist.data.shard_index import (
    SIDECAR_SUFFIX,
    ShardIndex,
    read_shard_index,
    write_shard_index,
)
from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.precompute.batches import Decoded, ShardReader, ShardSamples
from kandinsky_dist.precompute.encoders import Encoders
from kandinsky_dist.runtime.disk import sync


@dataclass
class Spent:
    """What this process has done: samples, and seconds of them in all and waiting for decoded images."""

    num_samples: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0


@dataclass(frozen=True)
class _Outputs:
    """Outputs of a batch on their way to the CPU."""

    decoded: Decoded
    tensors: dict[str, Tensor]
    num_rows: list[int] | None
    is_there: torch.cuda.Event | None


class ShardMaker:
    """Makes shards of encoder outputs.

    Args:
        reader: of the corpus.
        encoders: of the stage.
        description: of the corpus that is made.
        description_id: of it, which the shards are marked with.
        device: of the encoders.
        check_stop: called between batches; raises where the process is to stop.
    """

    def __init__(
        self,
        reader: ShardReader,
        encoders: Encoders,
        description: CacheDescription,
        description_id: str,
        device: torch.device,
        check_stop: Callable[[], None],
    ) -> None:
        self.spent = Spent()
        self._reader = reader
        self._encoders = encoders
        self._layouts = description.layouts()
        self._dtype = DTYPES[description.dtype]
        self._id = description_id
        self._device = device
        self._check_stop = check_stop

    def make(self, shard: int, tar: Path, partial: Path, order_bytes: int) -> None:
        """Makes a shard and its index.

        Args:
            shard: number of it in the corpus that is read.
            tar: to be written.
            partial: another name on the same file system until it is whole.
            order_bytes: of the shard that is read.

        Raises:
            DataError: the shard cannot be read.
            ConfigError: values that the type of the records has no number for.
        """
        start = monotonic()
        samples = self._reader.samples(shard)
        damage: dict[int, str] = {}
        try:
            with open(partial, "wb") as file:
                writer = webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0)
                for index, record in self._in_order(shard, samples, damage):
                    writer.write({"__key__": samples.keys[index], RECORD_EXTENSION: record})
                writer.close()
            sync(partial)
            # Damaged samples keep their place: the order, and what replaces them, stay those of the images.
            index_tar(partial, tar, samples, damage, self._id, order_bytes)
        finally:
            partial.unlink(missing_ok=True)
        self.spent.num_samples += len(samples.keys)
        self.spent.seconds += monotonic() - start

    def _in_order(
        self, shard: int, samples: ShardSamples, damage: dict[int, str]
    ) -> Iterator[tuple[int, bytes]]:
        """Each sample's index and record, ascending; an empty record where the sample is damaged."""
        ready: dict[int, bytes] = {}
        next_index = 0
        for outputs in self._encoded(self._timed(self._reader.batches(shard, samples))):
            self._check_stop()
            damage |= outputs.decoded.damage
            ready |= self._records(samples, outputs)
            while next_index in ready:
                yield next_index, ready.pop(next_index)
                next_index += 1
        assert next_index == len(samples.keys)

    def _timed(self, batches: Iterator[Decoded]) -> Iterator[Decoded]:
        while True:
            start = monotonic()
            batch = next(batches, None)
            self.spent.waiting_seconds += monotonic() - start
            if batch is None:
                return
            yield batch

    def _encoded(self, batches: Iterator[Decoded]) -> Iterator[_Outputs]:
        """Outputs of the batches. The device computes the next ones while these are dealt with."""
        pending: deque[_Outputs] = deque()
        for decoded in batches:
            pending.append(self._launched(decoded))
            if len(pending) > 1:
                yield pending.popleft()
        yield from pending

    def _launched(self, decoded: Decoded) -> _Outputs:
        if decoded.batch is None:
            return _Outputs(decoded, {}, None, None)
        batch, num_rows = without_padding(decoded.batch)
        outputs = self._encoders(on_device(batch, self._device))
        tensors = {
            name: tensor.to(self._dtype).to("cpu", non_blocking=True) for name, tensor in outputs.items()
        }
        is_there = None
        if self._device.type == "cuda":
            is_there = torch.cuda.Event()
            is_there.record()
        return _Outputs(decoded, tensors, num_rows, is_there)

    def _records(self, samples: ShardSamples, outputs: _Outputs) -> dict[int, bytes]:
        found = dict.fromkeys(outputs.decoded.indices, b"")
        if outputs.tensors:
            if outputs.is_there is not None:
                outputs.is_there.synchronize()
            whole = [index for index in found if index not in outputs.decoded.damage]
            check_finite(outputs.tensors)
            layout: RecordLayout = self._layouts[samples.aspects[whole[0]]]
            found |= zip(whole, layout.records(outputs.tensors, outputs.num_rows), strict=True)
        return found


def without_padding(batch: Batch) -> tuple[Batch, list[int] | None]:
    """A batch whose text is cut to its longest caption, and the length of each; None without text."""
    if batch.token_ids_BL is None:
        return batch, None
    assert batch.token_mask_BL is not None
    num_rows = batch.token_mask_BL.sum(1).tolist()
    longest = max(num_rows)
    ids_BL, mask_BL = batch.token_ids_BL[:, :longest], batch.token_mask_BL[:, :longest]
    return replace(batch, token_ids_BL=ids_BL, token_mask_BL=mask_BL), num_rows


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, copied beside what is computed there."""
    if device.type != "cuda":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Makes sure that no output overflowed the type that it is kept in.

    Raises:
        ConfigError: one did.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"{name} has values that {tensor.dtype} cannot hold: keep the outputs with --dtype bf16, or "
                "look for damage in the encoders"
            )


def index_tar(
    partial: Path,
    tar: Path,
    samples: ShardSamples,
    damage: dict[int, str],
    description_id: str,
    order_bytes: int,
) -> None:
    """Gives a written tar its name and, last, writes its index, with the sizes of the images."""
    with open_reader(str(partial)) as reader:
        table = walk_tar(reader, checksums=True)
        version = reader.version
    found, left_out = group_samples(str(partial), table.members, ())
    assert not left_out
    assert [sample.key for sample in found] == samples.keys
    sizes = zip(found, samples.widths, samples.heights, strict=True)
    metadata = {
        **version,
        "fingerprint": table.fingerprint,
        "captions": "txt",
        "checksums": "1",
        "num_without_image": "0",
        "num_without_caption": "0",
        "first_left_out": "",
        "order_bytes": str(order_bytes),
        "description": description_id,
        "damage": json.dumps([[samples.keys[index], said] for index, said in sorted(damage.items())]),
    }
    tar.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, tar)
    sync(tar.parent)
    write_shard_index(
        Path(f"{tar}{SIDECAR_SUFFIX}"),
        [replace(sample, width=width, height=height) for sample, width, height in sizes],
        metadata,
    )


def finished_index(tar: Path, description_id: str) -> ShardIndex | None:
    """The index of a shard that is done; None if it is not."""
    try:
        index = read_shard_index(f"{tar}{SIDECAR_SUFFIX}", "")
        is_same = index.metadata.get("description") == description_id
        return index if is_same and os.stat(tar).st_size == int(index.metadata["num_bytes"]) else None
    except (DataError, OSError, KeyError, ValueError):
        return None
