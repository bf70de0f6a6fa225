"""Other loaders on the same samples, each in the format and by the calls that its documentation shows.

Samples are one flat fp16 array (cached), or a JPEG file of which both views are made in the usual way; every
loader shuffles. The packages are imported where they are used: each is measured in a process of its own.
"""

import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kandinsky_dist.bench.data_contenders import (
    JPEG_SHARDS,
    RECORD_SHARDS,
    SHARDS_PER_CORPUS,
    Batches,
    Contender,
    Form,
    Layout,
    split,
    usual_views,
)
from kandinsky_dist.bench.data_samples import (
    LATENTS_CHW,
    NUM_LATENTS,
    NUM_VALUES,
    encoder_outputs,
    key,
    photographs,
)

SHUFFLE_SAMPLES = 1000
"""Of the buffers from which samples are drawn."""


def _values(data: bytes) -> Tensor:
    """The flat array of a record, without the seal that ours end with."""
    return torch.frombuffer(bytearray(data), dtype=torch.float16)[:NUM_VALUES]


def _again_and_again(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# webdataset


def _write_npy_shards(folder: Path, num_samples: int) -> None:
    """Two .npy members a sample, which the library's own decoder knows."""
    import webdataset

    folder.mkdir()
    per_shard = -(-num_samples // SHARDS_PER_CORPUS)
    with webdataset.ShardWriter(str(folder / "train-%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number, values in enumerate(encoder_outputs(num_samples)):
            latents_CHW = values[:NUM_LATENTS].reshape(LATENTS_CHW)
            members = {"latents.npy": _npy(latents_CHW), "embedding.npy": _npy(values[NUM_LATENTS:])}
            writer.write({"__key__": key(number), **members})


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _webdataset(
    pipeline: Callable[[Any], Any],
    finish: Callable[[Any], tuple[Tensor, Tensor]],
    folder: Path,
    batch_size: int,
    num_workers: int,
) -> Batches:
    import webdataset

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
    dataset = pipeline(dataset.shuffle(SHUFFLE_SAMPLES)).batched(batch_size, partial=False)
    loader = webdataset.WebLoader(dataset.repeat(), batch_size=None, num_workers=num_workers)
    for batch in loader:
        yield finish(batch)


def _decoded_npy(dataset: Any) -> Any:
    return dataset.decode().to_tuple("latents.npy", "embedding.npy")


def _own_records(dataset: Any) -> Any:
    return dataset.map(_tuple_of_record)


def _tuple_of_record(sample: Mapping[str, bytes]) -> tuple[Any]:
    return (np.frombuffer(sample["cached"], np.float16)[:NUM_VALUES],)


def _jpeg_views(dataset: Any) -> Any:
    return dataset.map(_views_of_sample)


def _views_of_sample(sample: Mapping[str, bytes]) -> tuple[Tensor, Tensor]:
    return usual_views(sample["jpg"])


def _tensors(batch: Any) -> tuple[Tensor, Tensor]:
    one, other = (torch.as_tensor(part) for part in batch)
    return one, other


def _tensor_split(batch: Any) -> tuple[Tensor, Tensor]:
    return split(torch.as_tensor(batch[0]))


# mosaicml-streaming


def _import_streaming() -> Any:
    """The package; its image datasets alone need torchvision, which it imports all the same."""
    if find_spec("torchvision") is None:
        absent = types.ModuleType("streaming.vision.base")
        absent.StreamingVisionDataset = object  # type: ignore[attr-defined]
        package = types.ModuleType("streaming.vision")
        package.__path__ = []
        sys.modules.update({"streaming.vision": package, "streaming.vision.base": absent})
    import streaming

    return streaming


def _write_mds(form: Form, folder: Path, num_samples: int) -> None:
    streaming = _import_streaming()
    encodings = {"cached": f"ndarray:float16:{NUM_VALUES}", "jpeg": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns={form: encodings[form]}, size_limit=2**26) as writer:
        for sample in _plain(form, num_samples):
            writer.write({form: sample})


def _plain(form: Form, num_samples: int) -> Iterator[Any]:
    return encoder_outputs(num_samples) if form == "cached" else photographs(num_samples)


def _mds(form: Form, folder: Path, batch_size: int, num_workers: int) -> Batches:
    streaming = _import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=True,
        collate_fn=partial(_collate, form),
        persistent_workers=num_workers > 0,
    )
    yield from _again_and_again(loader)


def _collate(form: Form, samples: list[Any]) -> tuple[Tensor, Tensor]:
    contents = [sample[form] if isinstance(sample, dict) else sample for sample in samples]
    if form == "cached":
        arrays = [torch.as_tensor(values) for values in contents]
        return split(torch.stack(arrays))
    clip, pixels = zip(*map(usual_views, contents), strict=True)
    return torch.stack(clip), torch.stack(pixels)


# litdata


def _write_litdata(form: Form, folder: Path, num_samples: int) -> None:
    from litdata.streaming import Cache  # what its `optimize` writes with, in one process

    cache = Cache(input_dir=str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(_plain(form, num_samples)):
        cache[number] = torch.from_numpy(sample) if form == "cached" else sample
    cache.done()
    cache.merge()


def _litdata(form: Form, folder: Path, batch_size: int, num_workers: int) -> Batches:
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True, batch_decode=0)
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, form),
        persistent_workers=num_workers > 0,
    )
    yield from _again_and_again(loader)


# megatron-energon


def _write_energon(form: Form, folder: Path, num_samples: int) -> None:
    """Our shards with its notes beside them."""
    import yaml
    from megatron.energon.flavors import BaseWebdatasetFactory

    (RECORD_SHARDS if form == "cached" else JPEG_SHARDS).write(folder, num_samples)
    tars = [path.name for path in sorted(folder.glob("*.tar"))]
    (folder / ".nv-meta").mkdir()
    BaseWebdatasetFactory.prepare_dataset(folder, tars, split_parts_ratio=[("train", 1.0)], workers=1)
    about = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(about))


def _energon(form: Form, folder: Path, batch_size: int, num_workers: int) -> Batches:
    from kandinsky_dist.bench.data_energon import train_loader

    make = _values if form == "cached" else usual_views
    extension = "cached" if form == "cached" else "jpg"
    for batch in train_loader(folder, extension, make, batch_size, num_workers, SHUFFLE_SAMPLES):
        yield split(batch[0]) if form == "cached" else (batch[0], batch[1])


def _rivals() -> Iterator[Contender]:
    workers = (0, 1, 2)
    npy = Layout("shards of .npy", "cached", _write_npy_shards, ("webdataset",))
    install = "webdataset"
    plain = partial(_webdataset, _decoded_npy, _tensors)
    yield Contender(WEBDATASET, npy, plain, workers, install)
    records = partial(_webdataset, _own_records, _tensor_split)
    yield Contender(f"{WEBDATASET}, our shards", RECORD_SHARDS, records, workers, install)
    views = partial(_webdataset, _jpeg_views, _tensors)
    yield Contender(WEBDATASET, JPEG_SHARDS, views, workers, install)
    for form in ("cached", "jpeg"):
        mds = Layout(f"MDS, {form}", form, partial(_write_mds, form), ("streaming",))
        yield Contender("mosaicml-streaming", mds, partial(_mds, form), workers, "mosaicml-streaming")
        lit = Layout(f"litdata, {form}", form, partial(_write_litdata, form), ("litdata",))
        yield Contender("litdata", lit, partial(_litdata, form), workers, "litdata")
        notes = Layout(f"energon, {form}", form, partial(_write_energon, form), ("megatron.energon",))
        yield Contender("megatron-energon", notes, partial(_energon, form), workers, "megatron-energon")


WEBDATASET = "webdataset"
RIVALS = tuple(_rivals())
