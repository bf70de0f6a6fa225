import json
import logging
import os
import shutil

import numpy as np
import pytest
from data_tars import sample, write_tar

from kandinsky_dist.data.index import index_shards
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.errors import DataError


def test_round_trip_and_place_independence(make_corpus, tmp_path):
    manifest = make_corpus([3, 1, 2])
    assert manifest.shard_sizes.tolist() == [3, 1, 2]
    assert manifest.shard_sizes.dtype == np.int64
    assert manifest.num_samples == 6
    shutil.move(manifest.root, tmp_path / "moved")
    moved = read_manifest(str(tmp_path / "moved"))
    assert moved.shards == manifest.shards
    assert moved.fingerprint == manifest.fingerprint


def test_patterns_select_in_their_order(make_corpus, tmp_path):
    root = make_corpus([1, 2, 3, 4]).root

    def names(shards):
        return [shard.path for shard in read_manifest(shards).shards]

    assert names(f"{root}/train-{{002..001}}.tar") == ["train-002.tar", "train-001.tar"]
    assert names(f"{root}/train-00{{0,3}}.tar") == ["train-000.tar", "train-003.tar"]
    assert names(f"{root}/train-00[12].tar") == ["train-001.tar", "train-002.tar"]
    assert names(f"{root}/train-003.tar") == ["train-003.tar"]
    (tmp_path / "list.txt").write_text(f"# two of them\n{root}/train-003.tar\n\ncorpus/train-000.tar\n")
    assert names(str(tmp_path / "list.txt")) == ["train-003.tar", "train-000.tar"]
    whole, part = read_manifest(str(root)), read_manifest(f"{root}/train-00[12].tar")
    assert whole.fingerprint != part.fingerprint
    assert read_manifest(f"{root}/*.tar").fingerprint == whole.fingerprint


def test_shards_of_two_folders(make_corpus, tmp_path):
    make_corpus([1], "a")
    make_corpus([2], "b")
    manifest = read_manifest(f"{tmp_path}/{{b,a}}/*.tar")
    assert [shard.path for shard in manifest.shards] == ["b/train-000.tar", "a/train-000.tar"]
    assert all(manifest.shard_path(number).is_file() for number in range(2))


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.tar", "names no .tar shards"),
        ("empty", "names no .tar shards"),
        ("corpus/train-{000..004}.tar", r"3 of 5 shards are missing, first .*train-002\.tar"),
        ("bare", "no manifest.json; run: kandinsky-dist data index"),
        ("bare/*.tar", "no manifest.json; run: kandinsky-dist data index"),
        ("list.txt", "No such file"),
        ("s3://bucket/{000..010}.tar", "remote"),
        ("corpus/train-00{0,0}.tar", "twice"),
    ],
)
def test_errors_are_one_line(make_corpus, tmp_path, monkeypatch, shards, words):
    make_corpus([1, 1])
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "bare" / "a.tar", sample(0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(shards)
    assert "\n" not in str(caught.value)


def test_missing_changed_and_unlisted_shards(make_corpus, caplog):
    manifest = make_corpus([1, 1, 1])
    extra = write_tar(manifest.root / "train-003.tar", sample(9))
    with caplog.at_level(logging.WARNING):
        assert read_manifest(str(manifest.root)).num_samples == 3
    assert "1 shards" in caplog.text
    assert "train-003.tar" in caplog.text
    with pytest.raises(DataError, match=r"1 of 4 shards are not in a manifest\.json, first .*train-003\.tar"):
        read_manifest(f"{manifest.root}/*.tar")
    extra.unlink()
    os.truncate(manifest.shard_path(1), manifest.shards[1].num_bytes - 512)
    with pytest.raises(DataError, match=r"train-001\.tar has 9728 bytes, its manifest says 10240"):
        read_manifest(str(manifest.root))
    manifest.shard_path(1).unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards are missing, first .*train-001\.tar"):
        read_manifest(str(manifest.root))


def test_damaged_or_foreign_manifest(make_corpus):
    manifest = make_corpus([1])
    path = manifest.root / "manifest.json"
    content = json.loads(path.read_text())
    for text, words in (
        ("{", "cannot be read"),
        (json.dumps({**content, "version": 9}), "version 9"),
        ("[]", "read"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_manifest(str(manifest.root))
    index_shards(str(manifest.root), progress=False)
    assert read_manifest(str(manifest.root)).fingerprint == manifest.fingerprint


def test_no_samples_at_all(make_corpus):
    manifest = make_corpus([1])
    path = manifest.root / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["num_samples"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no samples"):
        read_manifest(str(manifest.root))
