"""Batches of encoder outputs: the right sample's, cut and dropped and mirrored as the images' would be."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.campaign import cases
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.batch import text_length
from kandinsky_dist.data.cache_description import CACHE_NAME, CacheDescription, read_description
from kandinsky_dist.data.cached import CachedDataset, CachedViews, blank_batch
from kandinsky_dist.data.captions import CaptionSource, SoleCaption, dropped
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.indexing.subset import make_subset
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import ConfigError, SampleError
from kandinsky_dist.runtime.hashing import Stream, uniform

NUM_SAMPLES = 24
PRIOR = CacheDescription(
    settings={"stage": "prior", "data.captions": ["txt"], "text_encoder": "weights 1"},
    dtype="fp16",
    has_flips=True,
    widths={"image_embeds": 4, "text_embeds": 8, "text_states": 4},
    constants={"text_embeds": torch.full((8,), -1).half(), "text_states": torch.full((2, 4), -2).half()},
    notes={"precision": "fp32"},
)
DECODER = CacheDescription(
    settings={"stage": "decoder", "data.resolution": 64, "data.aspect_buckets": False},
    dtype="bf16",
    has_flips=False,
    widths={"image_embeds": 4, "latents": 4, "pixels": 8},
    constants={"image_embeds": torch.zeros(4).bfloat16()},
)


def num_states(number: int) -> int:
    return 3 + number % 6


def members(description: CacheDescription, number: int) -> dict[str, bytes]:
    """A record in which all is the sample's number, but for mirrored views: its negative."""
    layout = description.layouts()[WHOLE]
    tensors = {
        name: torch.full((1, *shape), float(number)).to(layout.dtype) for name, shape in layout.shapes.items()
    }
    if description.has_flips:
        tensors["image_embeds"][:, 1] *= -1
    if layout.rows is None:
        return {"cached": layout.records(tensors)[0]}
    tensors["text_states"] = torch.full((1, 77, layout.rows[1]), float(number)).to(layout.dtype)
    return {"cached": layout.records(tensors, [num_states(number)])[0]}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """prior/ and decoder/: shards of 8 records."""
    out = tmp_path_factory.mktemp("cached")
    for name, description in (("prior", PRIOR), ("decoder", DECODER)):
        samples = ({"__key__": f"{n:03d}", **members(description, n)} for n in range(1, NUM_SAMPLES + 1))
        write_shards(samples, out / name, samples_per_shard=8, origin={})
        (out / name / CACHE_NAME).write_text(description.to_json())
    return out


def dataset(folder, **settings) -> CachedDataset:
    order = Order([read_manifest(str(folder))], seed=0)
    description = read_description(str(folder), "data.shards")
    return CachedDataset(order, CachedViews(description=description, seed=0, **settings))


def numbers(order: Order, positions) -> list[int]:
    places = order.locate(positions)
    return [int(s * 8 + i) + 1 for s, i in zip(places.shards_B, places.indices_B, strict=True)]


def test_a_description_survives_its_file(tmp_path):
    for description in (PRIOR, DECODER):
        (tmp_path / CACHE_NAME).write_text(description.to_json())
        found = read_description(str(tmp_path), "data.shards")
        for item in dataclasses.fields(description):
            if item.name != "constants":
                assert getattr(found, item.name) == getattr(description, item.name)
        for name, tensor in description.constants.items():
            assert found.constants[name].dtype == tensor.dtype
            assert torch.equal(found.constants[name], tensor)


@given(
    positions=st.lists(st.integers(0, 3 * NUM_SAMPLES), min_size=1, max_size=9),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    flip=st.sampled_from([0.0, 0.5]),
)
def test_text_is_the_samples_or_dropped_where_that_of_images_is(corpora, positions, share, flip):
    data = dataset(corpora / "prior", caption_dropout=share, horizontal_flip=flip)
    (batch,) = data.batches([positions], 0)
    expected = numbers(data.order, positions)
    captions = dropped([str(number) for number in expected], np.array(positions), share=share, seed=0)
    lengths = [num_states(number) if captions[row] else 2 for row, number in enumerate(expected)]
    assert batch.text_states_BLD.shape == (len(positions), text_length(max(lengths), 77), 4)
    assert batch.token_mask_BL.sum(1).tolist() == lengths
    flips = uniform(0, Stream.FLIP, positions) < flip
    for row, (number, caption) in enumerate(zip(expected, captions, strict=True)):
        assert (batch.text_embeds_BD[row] == (number if caption else -1)).all()
        assert (batch.text_states_BLD[row, : lengths[row]] == (number if caption else -2)).all()
        assert (batch.text_states_BLD[row, lengths[row] :] == 0).all()
        assert batch.token_mask_BL[row, : lengths[row]].all()
        assert (batch.image_embeds_BD[row] == (-number if flips[row] else number)).all()
    assert list(batch.keys) == [f"{number:03d}" for number in expected]
    assert (batch.token_ids_BL, batch.clip_pixels_BCHW, batch.latents_BCHW) == (None, None, None)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_records_that_come_as_bytes_make_the_same_batches(tmp_path, corpora, name, monkeypatch):
    """As they do from a server; damage is found and replaced alike."""
    # Without the sidecar's checksums, so that it is the seal which finds damage.
    monkeypatch.setattr("kandinsky_dist.data.storage.check", lambda *_: None)
    folder = Path(shutil.copytree(corpora / name, tmp_path / name))
    with open(folder / "train-00001.tar", "r+b") as tar:
        tar.seek(512 + 3)
        tar.write(b"\x7f")
    local = dataset(folder)
    views = dataclasses.replace(local.views, caption_dropout=0.3, horizontal_flip=0.5)
    whole = ShardDataset(local.order, views, LocalStorage(local.order.manifest))
    lists = [range(first, first + 5) for first in range(0, 50, 5)]
    num_bad = 0
    for one, other in zip(
        CachedDataset(local.order, views).batches(lists, 0), whole.batches(lists, 2), strict=True
    ):
        for item in dataclasses.fields(one):
            mine, its = getattr(one, item.name), getattr(other, item.name)
            if isinstance(mine, torch.Tensor):
                assert torch.equal(mine, its), item.name
            else:
                assert (mine if item.name != "keys" else list(mine)) == its
        num_bad += len(one.bad_samples)
    assert num_bad >= 2


def test_latents_are_the_samples(corpora):
    data = dataset(corpora / "decoder")
    (batch,) = data.batches([[3, 1, 40]], 0)
    assert batch.latents_BCHW.shape == (3, 4, 8, 8)
    for row, number in enumerate(numbers(data.order, [3, 1, 40])):
        assert (batch.latents_BCHW[row] == number).all()
        assert (batch.image_embeds_BD[row] == number).all()


@pytest.mark.parametrize(("name", "description"), [("prior", PRIOR), ("decoder", DECODER)])
def test_a_blank_batch_has_the_shapes_of_a_read_one(corpora, name, description):
    (read,) = dataset(corpora / name).batches([[0]], 0)
    length = 0 if read.token_mask_BL is None else read.token_mask_BL.shape[1]
    blank = blank_batch(description, length, torch.device("cpu"))
    for item in dataclasses.fields(read):
        one, other = getattr(read, item.name), getattr(blank, item.name)
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), item.name
        elif item.name not in ("keys", "num_text_tokens"):
            assert one == other
    assert read.num_text_tokens <= blank.num_text_tokens == length


def test_the_loader_reads_by_threads_of_its_own_process(corpora, monkeypatch):
    """What worker processes would hand over is the same; none is started."""
    monkeypatch.setattr(Loader, "_from_workers", lambda *_: pytest.fail("worker processes were started"))
    found = []
    for num_workers in (0, 1, 3):
        loader = Loader(
            dataset(corpora / "prior", caption_dropout=0.3),
            global_batch_size=8,
            micro_batch_size=4,
            rank=0,
            world_size=1,
            num_workers=num_workers,
            device="cpu",
        )
        steps = loader.steps(8)
        found.append([batch for _ in range(4) for batch in next(steps)])
        steps.close()
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(one.positions_B, other.positions_B)
            assert torch.equal(one.text_states_BLD, other.text_states_BLD)
            assert list(one.keys) == list(other.keys)


def test_lengths_are_known_without_reading_and_count_dropout(corpora):
    data = dataset(corpora / "prior", caption_dropout=0.4)
    positions = np.arange(5, 60)
    (batch,) = data.batches([positions], 0)
    assert data.num_text_states(positions).tolist() == batch.token_mask_BL.sum(1).tolist()


def longest(batch) -> int:
    return int(batch.token_mask_BL.sum(1).max())


@pytest.mark.parametrize("world_size", cases([1, 2, 4], lambda world_size: world_size == 2))
def test_captions_of_one_length_share_a_micro_batch_and_a_step_keeps_its_samples(corpora, world_size):
    data = dataset(corpora / "prior", caption_dropout=0.4)

    def steps(rank: int, lengths) -> list:
        loader = Loader(
            data,
            global_batch_size=16,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
            num_workers=2,
            device="cpu",
            lengths=lengths,
        )
        generator = loader.steps(32)
        found = [next(generator) for _ in range(3)]
        generator.close()
        return found

    ranks = [steps(rank, data.num_text_states) for rank in range(world_size)]
    as_they_come = [steps(rank, None) for rank in range(world_size)]
    for step in range(3):
        batches = [ranks[k % world_size][step][k // world_size] for k in range(8)]
        together = [position for batch in batches for position in batch.positions_B.tolist()]
        assert sorted(together) == list(range(32 + 16 * step, 48 + 16 * step))
        lengths = data.num_text_states(np.array(together))
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        # As much to do on every rank, and less than in the order in which samples come.
        padded = [[longest(batch) for batch in rank[step]] for rank in ranks]
        for index in range(8 // world_size):
            assert padded[0][index] >= padded[-1][index]
        for index in range(8 // world_size - 1):
            assert padded[-1][index] >= padded[0][index + 1]
        before = sum(longest(batch) for rank in as_they_come for batch in rank[step])
        assert sum(longest(batch) for batch in batches) < before


def test_records_of_a_shape_have_the_layout_of_its_bucket():
    buckets = dataclasses.replace(
        DECODER, settings={**DECODER.settings, "data.aspect_buckets": True, "data.resolution": 512}
    )
    layouts = buckets.layouts()
    assert WHOLE not in layouts
    assert layouts[4].shapes["latents"] == (1, 4, 64, 64)
    assert layouts[8].shapes["latents"] == (1, 4, 48, 88)  # 2:1 of the area of 512 x 512


def test_a_subset_is_described_like_the_whole(corpora, tmp_path):
    out = tmp_path / "subset"
    make_subset(str(corpora / "prior"), out, limit=5, progress=False)
    (batch,) = dataset(out).batches([range(5)], 0)
    assert sorted(batch.keys) == ["001", "002", "003", "004", "005"]
    assert read_description(str(corpora / "prior" / "*.tar"), "data.shards").settings == PRIOR.settings


ONLY = SoleCaption((CaptionSource.parse("json.tags"),), 0)


@pytest.mark.parametrize("position", [0, 1, 17])
def test_the_only_caption_is_the_same_at_every_position(position):
    assert ONLY.choose({"json": b'{"tags": [" a cat ", ""]}'}, position, "a.tar:1") == "a cat"


def test_samples_of_several_captions_or_none_are_not_encoded_in_advance():
    with pytest.raises(
        ConfigError, match=r"a.tar:1: has 2 captions in .json field tags, and encoder outputs"
    ):
        ONLY.choose({"json": b'{"tags": ["a cat", "a dog"]}'}, 0, "a.tar:1")
    with pytest.raises(SampleError, match=r"a.tar:1: has no caption in .json field tags"):
        ONLY.choose({"json": b"{}"}, 0, "a.tar:1")


CHANGES = [
    ({"text_encoder": "weights 2"}, "text_encoder=weights 1, this run has weights 2"),
    ({"data.captions": ["json.tags"]}, r"data.captions=\['txt'\], this run has \['json.tags'\]"),
    ({"stage": "decoder"}, "stage=prior, this run has decoder"),
    ({"clip_size": 224}, "clip_size=None, this run has 224"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_outputs_of_other_encoders_or_views_are_refused(change, said):
    PRIOR.check(PRIOR.settings, "data.shards=x", horizontal_flip=0.5)
    with pytest.raises(ConfigError, match=f"data.shards=x was precomputed with {said}: precompute") as caught:
        PRIOR.check({**PRIOR.settings, **change}, "data.shards=x", horizontal_flip=0.0)
    assert "\n" not in str(caught.value)


def test_mirrored_images_must_have_been_asked_for():
    with pytest.raises(ConfigError, match=r"horizontal_flip=0.5 needs mirrored images.*--flip"):
        DECODER.check(DECODER.settings, "data.shards=x", horizontal_flip=0.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            PRIOR.to_json().replace('"layout_version": 1', '"layout_version": 9'),
            "records of layout 9, this program",
        ),
        (PRIOR.to_json()[:-60], "damaged cache.json"),
        (PRIOR.to_json().replace('"base64": "', '"base64": "AAAA'), "damaged cache.json"),
        ("[]", "damaged cache.json"),
        (PRIOR.to_json().replace("fp16", "fp8"), "damaged cache.json"),
    ],
)
def test_a_description_of_another_layout_or_a_damaged_one_is_refused(tmp_path, content, said):
    (tmp_path / CACHE_NAME).write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_description(str(tmp_path), "data.shards")
    assert "\n" not in str(caught.value)


def test_images_are_no_encoder_outputs(small_corpus):
    with pytest.raises(ConfigError, match=r"has no cache.json: these are no encoder outputs; make some with"):
        read_description(str(small_corpus / "train"), "data.shards")
