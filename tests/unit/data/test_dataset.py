import io
import json
import os

import numpy as np
import pytest
import torch
from data_tars import picture, sample, write_tar
from PIL import Image

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.captions import Captions, CaptionSource
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.decode import clip_view, square_view
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.sampling import first_pictures
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import ConfigError, DataError, SampleError
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream


def letters(captions):
    """A tokenizer of letters, padded with 0."""
    width = max(map(len, captions))
    ids = torch.tensor([[*map(ord, text), *[0] * (width - len(text))] for text in captions]).reshape(
        len(captions), width
    )
    return ids, ids != 0


def texts(batch):
    rows = zip(batch.token_ids_BL, batch.token_mask_BL, strict=True)
    return ["".join(map(chr, ids[mask])) for ids, mask in rows]


def captions(*sources):
    return Captions(tuple(CaptionSource.parse(source) for source in sources), seed=7)


def dataset(manifest, *, bucket_samples=None, **views):
    views = {
        "clip_size": 14,
        "resolution": 8,
        "tokenize": letters,
        "captions": captions("txt"),
        "caption_dropout": 0.0,
        "seed": 7,
        **views,
    }
    order = Order([manifest], seed=1, bucket_samples=bucket_samples)
    return ShardDataset(order, Views(**views), LocalStorage(order.manifest))


def batch_of(data, positions, num_threads=0):
    (batch,) = data.batches([positions], num_threads)
    return batch


@pytest.mark.parametrize("num_threads", [0, 3])
def test_batch_holds_what_was_asked_for(make_corpus, num_threads):
    data = dataset(make_corpus([5, 3]))
    positions = [3, 11, 0]
    batch = batch_of(data, positions, num_threads)
    assert batch.positions_B.tolist() == positions
    assert len(batch) == 3
    for row, key in enumerate(batch.keys):
        image = Image.open(io.BytesIO(picture(int(key)))).convert("RGB")
        np.testing.assert_allclose(batch.clip_pixels_BCHW[row].permute(1, 2, 0), clip_view(image, 14), atol=2)
        np.testing.assert_allclose(batch.pixels_BCHW[row].permute(1, 2, 0), square_view(image, 8), atol=2)
        assert texts(batch)[row] == f"caption {int(key)}"
    assert batch.clip_pixels_BCHW.dtype == batch.pixels_BCHW.dtype == torch.uint8
    assert batch.pixels_BCHW.is_contiguous()
    assert batch.bad_samples == ()


def test_one_epoch_has_every_key_once(make_corpus):
    data = dataset(make_corpus([5, 0, 3]), clip_size=None, resolution=None, tokenize=None, captions=None)
    assert data.num_samples == 8
    batch = batch_of(data, range(8))
    assert sorted(batch.keys) == [f"{number:05d}" for number in range(8)]
    assert (batch.clip_pixels_BCHW, batch.pixels_BCHW, batch.token_ids_BL, batch.token_mask_BL) == (None,) * 4


def test_caption_dropout_is_a_function_of_the_position(make_corpus):
    manifest = make_corpus([6])
    positions = list(range(600))
    batch = batch_of(dataset(manifest, clip_size=None, resolution=None, caption_dropout=0.3), positions)
    dropped = ~batch.token_mask_BL.any(dim=1)
    expected = rng.uniform(7, Stream.CAPTION_DROPOUT, torch.tensor(positions)) < 0.3
    assert torch.equal(dropped, expected)
    assert 0.2 < dropped.float().mean() < 0.4
    for dropout, share in ((0.0, 0.0), (1.0, 1.0)):
        data = dataset(manifest, clip_size=None, resolution=None, caption_dropout=dropout)
        assert (~batch_of(data, [0, 1, 2]).token_mask_BL.any(dim=1)).float().mean() == share


def test_captions_are_stripped_utf8(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.txt", " ein Bär\n".encode())])
    assert texts(batch_of(dataset(index_shards(str(tmp_path), progress=False)), [0])) == ["ein Bär"]


def test_flips_are_a_function_of_the_position_and_of_both_views(make_corpus):
    manifest = make_corpus([1])
    plain, flipped = (batch_of(dataset(manifest, horizontal_flip=share), range(40)) for share in (0.0, 0.5))
    expected = rng.uniform(7, Stream.FLIP, torch.arange(40)) < 0.5
    assert 10 < expected.sum() < 30
    for before, after in (
        (plain.pixels_BCHW, flipped.pixels_BCHW),
        (plain.clip_pixels_BCHW, flipped.clip_pixels_BCHW),
    ):
        mirrored = torch.where(expected[:, None, None, None], before.flip(3), before)
        assert torch.equal(after, mirrored)


def test_random_crops_are_a_function_of_the_position_and_not_of_clips_view(make_corpus):
    manifest = make_corpus([1])
    centre, anywhere, again = (
        batch_of(dataset(manifest, random_crop=crop), range(20)) for crop in (False, True, True)
    )
    assert torch.equal(anywhere.pixels_BCHW, again.pixels_BCHW)
    assert torch.equal(anywhere.clip_pixels_BCHW, centre.clip_pixels_BCHW)
    assert len(anywhere.pixels_BCHW.flatten(1).unique(dim=0)) > 5  # one image, cut at many places


def test_buckets_have_the_area_of_the_square(tmp_path):
    members = []
    for number in range(24):
        members += sample(number, png=picture(number, size=(200, 100) if number % 3 else (100, 100)))
    write_tar(tmp_path / "a.tar", members)
    data = dataset(index_shards(str(tmp_path), progress=False), bucket_samples=8, resolution=128)
    shapes = [
        tuple(batch.pixels_BCHW.shape[2:])
        for batch in data.batches([range(first, first + 4) for first in range(0, 24, 4)], 2)
    ]
    assert sorted(shapes) == sorted([(64, 192)] * 4 + [(128, 128)] * 2)
    assert shapes[0] == shapes[1], "a global batch of 8 is of one bucket"


DAMAGE = {
    "png": (b"broken", "cannot be decoded as an image"),
    "txt": ("Bär".encode("latin-1"), "is not UTF-8"),
}


@pytest.mark.parametrize("extension", sorted(DAMAGE))
def test_a_damaged_sample_is_replaced_by_a_rule_and_named(tmp_path, extension):
    data, reason = DAMAGE[extension]
    members = [member for number in range(6) for member in sample(number)]
    members += sample(6, **{extension: data})
    write_tar(tmp_path / "a.tar", members)
    manifest = index_shards(str(tmp_path), progress=False)
    batches = [batch_of(dataset(manifest), range(7), num_threads) for num_threads in (0, 2)]
    one_by_one = [batch_of(dataset(manifest), [position]) for position in range(7)]
    assert batches[0].keys == batches[1].keys == [batch.keys[0] for batch in one_by_one]
    assert sorted(set(batches[0].keys)) == [f"{number:05d}" for number in range(6)]
    for found in (*batches, next(batch for batch in one_by_one if batch.bad_samples)):
        (bad,) = found.bad_samples
        row = found.positions_B.tolist().index(bad.position)
        assert bad.reason.startswith("a.tar:00006: ")
        assert reason in bad.reason
        assert bad.replaced_by == f"a.tar:{found.keys[row]}"


def test_changed_bytes_are_seen_where_indexing_read_them(tmp_path):
    """A flipped bit in a stored pixel decodes without complaint: only the checksum knows."""
    tar = write_tar(tmp_path / "a.tar", [member for number in range(4) for member in sample(number)])
    manifest = index_shards(str(tmp_path), progress=False, checksums=True)
    before = batch_of(dataset(manifest), range(4))
    content, times = bytearray(tar.read_bytes()), os.stat(tar)
    place = content.find(b"caption 2")
    content[place] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = batch_of(dataset(manifest), range(4))
    (bad,) = after.bad_samples
    assert bad.reason.startswith("a.tar:00002: .txt is not what was indexed")
    changed = [row for row in range(4) if before.keys[row] != after.keys[row]]
    assert [before.keys[row] for row in changed] == ["00002"]


def test_nothing_but_damage_is_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0, png=b"broken"))
    with pytest.raises(DataError, match=rf"^{NUM_ATTEMPTS} samples in a row cannot be used") as caught:
        batch_of(dataset(index_shards(str(tmp_path), progress=False)), [0])
    assert not isinstance(caught.value, SampleError)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_gone_is_not_a_bad_sample(make_corpus):
    manifest = make_corpus([3, 3])
    os.remove(manifest.tar(1))
    with pytest.raises(DataError, match="put the shard back") as caught:
        batch_of(dataset(manifest), range(6))
    assert not isinstance(caught.value, SampleError)


MEMBERS = {
    "txt": b"plain",
    "json": json.dumps({"long": "a long one", "tags": ["a", " b ", "", 3], "empty": " "}).encode(),
}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["txt"], {"plain": 1.0}),
        (["json.long"], {"a long one": 1.0}),
        (["txt=3", "json.long"], {"plain": 0.75, "a long one": 0.25}),
        (["json.tags"], {"a": 0.5, "b": 0.5}),
        (
            ["txt=0.5", "json.tags=0.25", "json.missing=10", "json.empty=10"],
            {"plain": 2 / 3, "a": 1 / 6, "b": 1 / 6},
        ),
    ],
)
def test_captions_by_weight(sources, expected):
    choice = captions(*sources)
    drawn = [choice.choose(MEMBERS, position, "s") for position in range(4000)]
    assert drawn[:100] == [choice.choose(MEMBERS, position, "s") for position in range(100)]
    assert {text: round(drawn.count(text) / 4000, 1) for text in set(drawn)} == pytest.approx(
        expected, abs=0.06
    )


@pytest.mark.parametrize("source", ["", "=1", "txt=0", "txt=-1", "txt=x", "txt=inf", ".long"])
def test_wrong_caption_sources(source):
    with pytest.raises(ConfigError, match=r"^data\.captions has "):
        CaptionSource.parse(source)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "has no caption in .txt, .json field long"),
        ({"json": b"{"}, "its .json is not JSON"),
        ({"json": b"[1]"}, "has no caption"),
        ({"json": b'{"long": 5}'}, "has no caption"),
        ({"txt": b"\xff"}, "is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_had(members, reason):
    with pytest.raises(SampleError, match=reason):
        captions("txt", "json.long").choose(members, 0, "s")


def test_batch_moves_with_all_its_tensors():
    batch = Batch(torch.arange(2), ["a", "b"], None, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, None)
    moved = batch.to("meta")
    assert [tensor.device.type for tensor in moved.tensors()] == ["meta", "meta"]
    assert moved.keys == batch.keys
    assert moved.clip_pixels_BCHW is None


def test_first_pictures(make_corpus):
    shards = str(make_corpus([5, 2]).root)
    sizes = [len(pictures) for pictures in first_pictures(shards, num_samples=6, side=10, batch_size=4)]
    assert sizes == [4, 2]
    everything = torch.cat(list(first_pictures(shards, num_samples=100, side=10, batch_size=3)))
    assert everything.shape == (7, 3, 10, 10)
    assert everything.dtype == torch.uint8
    assert len(everything.flatten(1).unique(dim=0)) == 7
