import io
import logging
import os

import pytest
from data_tars import picture, sample, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from kandinsky_dist.data.index import index_shards
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.shard_index import read_shard_index, sidecar_path
from kandinsky_dist.errors import DataError


def test_keys_and_extensions_as_webdataset_sees_them(tmp_path):
    members = []
    for key in ("a", "folder.v2/b", "folder.v2/c c", "ünïcode"):
        members += [(f"{key}.JPG", picture(1)), (f"{key}.txt", b"words"), (f"{key}.seg.png", b"mask")]
    members += [(".hidden.txt", b""), ("__note__/x.txt", b""), ("no_extension", b"")]
    path = write_tar(tmp_path / "a.tar", members)
    index_shards(str(tmp_path), progress=False)
    index = read_shard_index(path)
    data = path.read_bytes()
    ours = [
        (index.key(n), {name: data[start : start + size] for name, (start, size) in index.members(n).items()})
        for n in range(len(index))
    ]
    theirs = [
        (item.pop("__key__"), {name: value for name, value in item.items() if not name.startswith("__")})
        for item in group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(data)))
    ]
    assert ours == theirs
    assert index.extensions == ("jpg", "seg.png", "txt")


def test_unusable_samples_are_left_out_and_counted(tmp_path, caplog):
    members = [*sample(0), ("1.png", picture(1)), ("2.txt", b"x"), ("3.json", b"{}"), *sample(4)]
    write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # the second time from the sidecar
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert index_shards(str(tmp_path), progress=False).num_samples == 2
        assert "3 samples left out (2 with no image, 1 with no caption), first a.tar:1" in caplog.text


def test_empty_tar_warns_unless_nothing_remains(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="1 shards; they are empty"):
        index_shards(str(tmp_path), progress=False)
    write_tar(tmp_path / "b.tar", sample(0))
    with caplog.at_level(logging.WARNING):
        assert index_shards(str(tmp_path), progress=False).shard_sizes.tolist() == [0, 1]
    assert "1 shards have no usable sample, first a.tar" in caplog.text


@pytest.mark.parametrize(
    "members", [sample(0) + sample(1) + sample(0), [("a.png", b""), ("a.PNG", b""), ("a.txt", b"")]]
)
def test_a_key_twice_is_refused(tmp_path, members):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"a\.tar has the key .* twice"):
        index_shards(str(tmp_path), progress=False)


def test_only_changed_shards_are_read_again(make_corpus):
    manifest = make_corpus([2, 2])
    sidecars = [sidecar_path(manifest.shard_path(number)) for number in range(2)]
    before = [path.stat().st_ino for path in sidecars]
    index_shards(str(manifest.root), progress=False)
    assert [path.stat().st_ino for path in sidecars] == before
    write_tar(manifest.shard_path(1), sample(7) + sample(8) + sample(9))
    again = index_shards(str(manifest.root), progress=False)
    assert again.shard_sizes.tolist() == [2, 3]
    assert sidecars[0].stat().st_ino == before[0]
    assert again.fingerprint != manifest.fingerprint


def test_an_interrupted_run_continues(make_corpus):
    manifest = make_corpus([1] * 3)
    (manifest.root / "manifest.json").unlink()
    broken = manifest.shard_path(2)
    data = broken.read_bytes()
    broken.write_bytes(data[:700])
    kept = [sidecar_path(manifest.shard_path(number)).stat().st_ino for number in range(2)]
    with pytest.raises(DataError, match=r"train-002\.tar is cut short"):
        index_shards(str(manifest.root), progress=False)
    assert not (manifest.root / "manifest.json").exists()
    broken.write_bytes(data)
    assert index_shards(str(manifest.root), progress=False).fingerprint == manifest.fingerprint
    assert [sidecar_path(manifest.shard_path(number)).stat().st_ino for number in range(2)] == kept


def test_parallel_equals_serial(make_corpus):  # two seconds: processes start
    manifest = make_corpus([1] * 8)
    for number in range(8):
        sidecar_path(manifest.shard_path(number)).unlink()
    assert index_shards(str(manifest.root), num_processes=2, progress=False) == manifest
    os.truncate(manifest.shard_path(5), 100)
    with pytest.raises(DataError, match=r"train-005\.tar"):
        index_shards(str(manifest.root), num_processes=2, progress=False)


def test_indexing_a_part_keeps_the_rest(make_corpus):
    manifest = make_corpus([1, 1])
    write_tar(manifest.root / "train-002.tar", sample(5))
    part = index_shards(str(manifest.root / "train-002.tar"), progress=False)
    assert part.num_samples == 1
    assert read_manifest(str(manifest.root)).num_samples == 3
    manifest.shard_path(0).unlink()
    index_shards(str(manifest.root / "train-002.tar"), progress=False)
    assert [shard.path for shard in read_manifest(str(manifest.root)).shards] == [
        "train-001.tar",
        "train-002.tar",
    ]


def test_damaged_sidecar_is_named(make_corpus):
    manifest = make_corpus([1])
    path = sidecar_path(manifest.shard_path(0))
    for data in (b"", b"\xff" * 8, b"nonsense" * 10, path.read_bytes()[:-9]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train-000\.tar\.idx cannot be read .*data index"):
            read_shard_index(manifest.shard_path(0))
    path.unlink()
    with pytest.raises(DataError, match="is missing; run: kandinsky-dist data index"):
        read_shard_index(manifest.shard_path(0))
