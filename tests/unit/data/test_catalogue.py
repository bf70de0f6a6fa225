import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_tars import sample, write_tar
from helpers.servers import http_server
from test_manifest import rows

from kandinsky_dist.data.aspects import NUM_ASPECTS
from kandinsky_dist.data.catalogue import check_presence, read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.locations import Texts
from kandinsky_dist.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from kandinsky_dist.errors import DataError


def names(shards: str) -> list[str]:
    manifest = read_manifest(shards)
    check_presence(manifest, shards)
    return [os.path.basename(tar) for tar in manifest.tars]


def test_patterns_select_in_their_order(make_corpus, tmp_path):
    root = make_corpus([1, 2, 3, 4]).root
    assert names(f"{root}/train-{{002..001}}.tar") == ["train-002.tar", "train-001.tar"]
    assert names(f"{root}/train-00{{0,3}}.tar") == ["train-000.tar", "train-003.tar"]
    assert names(f"{root}/train-00[12].tar") == ["train-001.tar", "train-002.tar"]
    assert names(f"{root}/train-003.tar") == ["train-003.tar"]
    (tmp_path / "list.txt").write_text(f"# two of them\n{root}/train-003.tar\n\ncorpus/train-000.tar\n")
    assert names(str(tmp_path / "list.txt")) == ["train-003.tar", "train-000.tar"]
    whole, part = read_manifest(root), read_manifest(f"{root}/train-00[12].tar")
    assert part.num_samples_S.tolist() == [2, 3]
    assert whole.fingerprint != part.fingerprint
    assert read_manifest(f"{root}/*.tar").fingerprint == whole.fingerprint


def test_shards_of_two_folders(make_corpus, tmp_path):
    make_corpus([1], "a")
    make_corpus([2], "b")
    manifest = read_manifest(f"{tmp_path}/{{b,a}}/*.tar")
    assert [manifest.tar(number) for number in range(2)] == [
        f"{tmp_path}/{name}/train-000.tar" for name in "ba"
    ]


def test_sidecars_alone_amount_to_the_manifest(make_corpus):
    manifest = make_corpus([2, 1])
    found = read_manifest(f"{manifest.root}/*.tar")
    for ours, theirs in zip(rows(found), rows(manifest), strict=True):
        assert ours == replace(
            theirs, tar=f"{manifest.root}/{theirs.tar}", sidecar=f"{manifest.root}/{theirs.sidecar}"
        )


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.tar", "names no .tar shards"),
        ("empty", "names no .tar shards"),
        ("corpus/nowhere.tar", r"1 of 1 shards are missing, first corpus/nowhere\.tar"),
        ("bare", r"no manifest\.safetensors; run: kandinsky-dist data index bare"),
        (
            "bare/*.tar",
            r"1 of 1 shards are not indexed, first bare/a\.tar; run: .* data index 'bare/\*\.tar'",
        ),
        ("list.txt", "No such file"),
        ("s3://bucket/{000..010}.tar", r"run: kandinsky-dist data index 's3://bucket/.*' --out FOLDER"),
        ("https://host/a.tar?key=secret", "--out FOLDER, and give FOLDER as data.shards"),
        ("remote.txt", r"names shards on a server, .* data index 'remote\.txt' --out FOLDER"),
        ("corpus/train-00{0,0}.tar", "twice"),
        ("pipe:cat corpus/train-000.tar", r"data\.allow_pipe=true"),
    ],
)
def test_errors_are_one_line(make_corpus, tmp_path, monkeypatch, shards, words):
    make_corpus([1, 1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "remote.txt").write_text("https://host/a.tar\n")
    write_tar(tmp_path / "bare" / "a.tar", sample(0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(shards)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_changed_and_unlisted_shards(make_corpus, caplog):
    manifest = make_corpus([1, 1, 1])
    root = manifest.root

    def check() -> None:
        check_presence(read_manifest(root), root)

    extra = write_tar(Path(root) / "deep" / "train-003.tar", sample(9))
    with caplog.at_level(logging.WARNING):
        check()
    assert caplog.messages == [
        f"1 shards in {root} are not in its manifest nor used, first deep/train-003.tar; "
        f"run: kandinsky-dist data index {root}"
    ]
    with pytest.raises(DataError, match=r"1 of 4 shards are not indexed, first .*train-003\.tar"):
        read_manifest(f"{root}/**/*.tar")
    extra.unlink()
    os.truncate(manifest.tar(1), int(manifest.num_bytes_S[1]) - 512)
    with pytest.raises(DataError, match=r"train-001\.tar has 9728 bytes, its manifest says 10240"):
        check()
    os.unlink(manifest.tar(1))
    with pytest.raises(DataError, match=r"1 of 3 shards are missing, first .*train-001\.tar"):
        check()


def test_a_lost_sidecar_is_named_before_training(make_corpus):
    manifest = make_corpus([1, 1])
    os.unlink(manifest.sidecar(1))
    with pytest.raises(
        DataError, match=r"1 of 2 shards have lost their index, first .*train-001\.tar\.idx; run:"
    ):
        check_presence(read_manifest(manifest.root), manifest.root)


def test_a_folder_of_an_index_alone(make_corpus, tmp_path, caplog):
    root = make_corpus([1, 2]).root
    index_shards(root, out=tmp_path / "out", progress=False)
    with caplog.at_level(logging.WARNING):
        assert names(str(tmp_path / "out")) == ["train-000.tar", "train-001.tar"]
    assert caplog.messages == []


def test_no_samples_at_all(make_corpus):
    manifest = make_corpus([1])
    write_manifest(Path(manifest.root), replace(manifest, num_samples_S=np.zeros(1, np.int64)))
    with pytest.raises(DataError, match="has 1 shards but no samples"):
        read_manifest(manifest.root)


def test_many_shards_are_all_looked_at(tmp_path):
    """More than there are threads: hard links of one small file, the last one missing."""
    num_shards = 3001
    tars = [f"{shard:05d}.tar" for shard in range(num_shards)]
    (tmp_path / "one").write_bytes(bytes(10))
    (tmp_path / "c").mkdir()
    for tar in tars:
        os.link(tmp_path / "one", tmp_path / "c" / tar)
    manifest = Manifest(
        str(tmp_path / "c"),
        Texts.of(tars),
        Texts.of(tars),
        np.ones(num_shards, np.int64),
        np.full(num_shards, 10),
        np.zeros((num_shards, 32), np.uint8),
        np.ones((num_shards, NUM_ASPECTS), np.int64),
    )
    check_presence(manifest, manifest.root)
    (tmp_path / "c" / tars[-1]).unlink()
    with pytest.raises(DataError, match=r"1 of 3001 shards are missing, first .*/03000\.tar"):
        check_presence(manifest, manifest.root)


def test_a_folder_on_a_server(make_corpus):
    manifest = make_corpus([2, 1])
    with http_server(Path(manifest.root)) as server:
        for shards in (server.url, f"{server.url}/"):
            found = read_manifest(shards)
            assert found.fingerprint == manifest.fingerprint
            assert found.tar(1) == f"{server.url}/train-001.tar"
            check_presence(found, shards)  # nothing is asked of a server for each shard
        assert dict(server.num_requests) == {MANIFEST_NAME: 2}
        (Path(manifest.root) / MANIFEST_NAME).unlink()
        with pytest.raises(
            DataError, match=rf"{server.url} has no manifest\.safetensors; run: .* --out FOLDER"
        ):
            read_manifest(server.url)
