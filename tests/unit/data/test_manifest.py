import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.aspects import NUM_ASPECTS
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.locations import Texts
from kandinsky_dist.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    concatenate,
    load_manifest,
    write_manifest,
)
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError


def rows(manifest: Manifest) -> list[Shard]:
    return [manifest.shard(number) for number in range(len(manifest))]


def test_round_trip_and_place_independence(make_corpus, tmp_path):
    manifest = make_corpus([3, 1, 2])
    assert manifest.num_samples_S.tolist() == [3, 1, 2]
    assert manifest.num_samples == 6
    shutil.move(manifest.root, tmp_path / "moved")
    moved = read_manifest(str(tmp_path / "moved"))
    assert rows(moved) == rows(manifest)
    assert moved.fingerprint == manifest.fingerprint


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=10))
def test_columns_of_text(texts):
    column = Texts.of(texts)
    assert list(column) == texts
    assert [column[index] for index in range(len(column))] == texts


def test_names_that_are_not_utf_8_come_back():
    name = b"\xff.tar".decode("utf-8", "surrogateescape")
    assert list(Texts.of(["a", name])) == ["a", name]


def many(num_shards: int) -> Manifest:
    names = [f"{shard // 1000:04d}/{shard:06d}.tar" for shard in range(num_shards)]
    return Manifest(
        "/nowhere",
        Texts.of(names),
        Texts.of([f"{name}.idx" for name in names]),
        np.full(num_shards, 10_000),
        np.full(num_shards, 10**9),
        np.random.default_rng(0).integers(0, 256, (num_shards, 32), np.uint8),
        np.full((num_shards, NUM_ASPECTS), 1000),
    )


def test_a_corpus_that_was_made_from_another_one_keeps_its_order(tmp_path):
    """Though its shards are shorter, by which other chunks would be cut; on disk and in a mixture too."""
    images = many(12)
    rows = [images.shard(shard) for shard in range(12)]
    outputs = Manifest.of(tmp_path, [replace(row, num_bytes=5000, order_bytes=row.num_bytes) for row in rows])
    write_manifest(tmp_path, outputs)
    read = load_manifest(str(tmp_path), "")
    assert read.shard(3) == outputs.shard(3)
    assert read.fingerprint == outputs.fingerprint
    strangers = Manifest.of(tmp_path, [replace(row, num_bytes=5000) for row in rows])
    assert outputs.fingerprint != strangers.fingerprint

    def places(*manifests: Manifest) -> list[int]:
        weights = [1.0] * len(manifests) if len(manifests) > 1 else None
        found = Order(manifests, seed=0, weights=weights).locate(range(5000))
        return (found.shards_B * 10**6 + found.indices_B).tolist()

    assert places(read) == places(images) != places(strangers)
    assert places(read, strangers) == places(images, strangers)
    assert concatenate([read, images]).order_bytes == 2 * images.order_bytes


def test_a_hundred_thousand_shards_open_at_once(tmp_path):
    """A billion samples: the file is mapped, not parsed, so that each of many ranks opens it cheaply."""
    write_manifest(tmp_path, many(100_000))
    assert (tmp_path / MANIFEST_NAME).stat().st_size < 20 << 20
    tracemalloc.start()
    manifest = load_manifest(str(tmp_path), "")
    assert manifest.num_samples == 10**9
    assert manifest.tar(99_999) == f"{tmp_path}/0099/099999.tar"
    assert manifest.shard(54_321).tar == "0054/054321.tar"
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20, peak_bytes
    assert not manifest.num_bytes_S.flags.owndata  # a part of the mapped file


def test_damaged_or_foreign_manifest(make_corpus):
    manifest = make_corpus([1])
    path = Path(manifest.root) / MANIFEST_NAME
    whole = path.read_bytes()
    columns = safetensors.numpy.load(whole)
    for data, words in (
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (whole[:50], "cut short"),
        (whole[:-7], "cannot be read"),
        (safetensors.numpy.save(columns, {"version": "9"}), "version 9, this program reads 2"),
        (safetensors.numpy.save({"tar_bytes": columns["tar_bytes"]}, {"version": "2"}), "cannot be read"),
        (safetensors.numpy.save(columns), "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{words}.*; run: kandinsky-dist data index {manifest.root}"):
            read_manifest(manifest.root)
    assert index_shards(manifest.root, progress=False).fingerprint == manifest.fingerprint
    assert read_manifest(manifest.root).fingerprint == manifest.fingerprint


def test_several_corpora_as_one(make_corpus):
    one, two = make_corpus([2, 1], "one"), make_corpus([3], "two")
    both = concatenate([one, two])
    assert both.num_samples_S.tolist() == [2, 1, 3]
    assert [both.tar(number) for number in range(3)] == [one.tar(0), one.tar(1), two.tar(0)]
    assert LocalStorage(both).read(Place(2, 2)).key == "00002"
    assert concatenate([one]) is one
