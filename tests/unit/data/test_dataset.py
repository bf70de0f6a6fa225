import io

import numpy as np
import pytest
import torch
from data_tars import picture, sample, write_tar
from PIL import Image

from kandinsky_dist.data.dataset import Batch, ShardDataset, Views
from kandinsky_dist.data.decode import clip_view, square_view
from kandinsky_dist.data.index import index_shards
from kandinsky_dist.data.plan import Plan
from kandinsky_dist.data.sampling import first_pictures
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream


def letters(captions):
    """A tokenizer of letters, padded with 0."""
    width = max(map(len, captions))
    ids = torch.tensor([[*map(ord, text), *[0] * (width - len(text))] for text in captions]).reshape(
        len(captions), width
    )
    return ids, ids != 0


def dataset(manifest, **views):
    views = {
        "clip_size": 14,
        "resolution": 8,
        "tokenize": letters,
        "caption_dropout": 0.0,
        "seed": 7,
        **views,
    }
    return ShardDataset(manifest, Plan(manifest.shard_sizes, seed=1), Views(**views), LocalStorage(manifest))


def test_batch_holds_what_was_asked_for(make_corpus):
    data = dataset(make_corpus([5, 3]))
    positions = [3, 11, 0]
    batch = data.__getitems__(positions)
    assert batch.positions_B.tolist() == positions
    assert len(batch) == 3
    for row, key in enumerate(batch.keys):
        image = Image.open(io.BytesIO(picture(int(key)))).convert("RGB")
        np.testing.assert_array_equal(batch.clip_pixels_BCHW[row].permute(1, 2, 0), clip_view(image, 14))
        np.testing.assert_array_equal(batch.pixels_BCHW[row].permute(1, 2, 0), square_view(image, 8))
        text = "".join(map(chr, batch.token_ids_BL[row][batch.token_mask_BL[row]]))
        assert text == f"caption {int(key)}"
    assert batch.clip_pixels_BCHW.dtype == batch.pixels_BCHW.dtype == torch.uint8
    assert batch.pixels_BCHW.is_contiguous()


def test_one_epoch_has_every_key_once(make_corpus):
    data = dataset(make_corpus([5, 0, 3]), clip_size=None, resolution=None, tokenize=None)
    assert len(data) == 8
    batch = data.__getitems__(list(range(8)))
    assert sorted(batch.keys) == [f"{number:05d}" for number in range(8)]
    assert (batch.clip_pixels_BCHW, batch.pixels_BCHW, batch.token_ids_BL, batch.token_mask_BL) == (None,) * 4


def test_caption_dropout_is_a_function_of_the_position(make_corpus):
    manifest = make_corpus([6])
    positions = list(range(600))
    batch = dataset(manifest, clip_size=None, resolution=None, caption_dropout=0.3).__getitems__(positions)
    dropped = ~batch.token_mask_BL.any(dim=1)
    expected = rng.uniform(7, Stream.CAPTION_DROPOUT, torch.tensor(positions)) < 0.3
    assert torch.equal(dropped, expected)
    assert 0.2 < dropped.float().mean() < 0.4
    for dropout, share in ((0.0, 0.0), (1.0, 1.0)):
        batch = dataset(manifest, clip_size=None, resolution=None, caption_dropout=dropout).__getitems__(
            [0, 1, 2]
        )
        assert (~batch.token_mask_BL.any(dim=1)).float().mean() == share


def test_captions_are_stripped_utf8(tmp_path):
    write_tar(tmp_path / "a" / "a.tar", [("a.png", picture(0)), ("a.txt", " ein Bär\n".encode())])
    data = dataset(index_shards(str(tmp_path / "a"), progress=False))
    assert "".join(map(chr, data[0].token_ids_BL[0])) == "ein Bär"
    write_tar(tmp_path / "b" / "b.tar", [("k.png", picture(0)), ("k.txt", "Bär".encode("latin-1"))])
    with pytest.raises(DataError, match=r"^b\.tar:k: its \.txt is not UTF-8 .*at byte 1"):
        dataset(index_shards(str(tmp_path / "b"), progress=False))[0]


def test_a_broken_image_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0, png=b"broken"))
    with pytest.raises(DataError, match=r"^a\.tar:00000: cannot be decoded"):
        dataset(index_shards(str(tmp_path), progress=False))[0]


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
