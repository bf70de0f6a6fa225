import logging
import multiprocessing
import resource

import pytest
from data_tars import picture

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.shard_index import read_shard_index
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import ConfigError, DataError, DiskFullError

ORIGIN = {"command": "test", "seed": 1}


def samples(count):
    for number in range(count):
        yield {
            "__key__": f"k{number}",
            "png": picture(number),
            "txt": f"caption {number}".encode(),
            "json": b"{}",
        }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}


def test_shards_are_complete_readable_and_deterministic(tmp_path):
    manifest = write_shards(samples(5), tmp_path / "a", samples_per_shard=2, origin=ORIGIN)
    assert list(manifest.tars) == [f"train-{number:05d}.tar" for number in range(3)]
    assert manifest.num_samples_S.tolist() == [2, 2, 1]
    assert manifest.fingerprint == read_manifest(str(tmp_path / "a")).fingerprint
    found = LocalStorage(manifest).read(Place(1, 1))
    assert (found.key, found.members["png"], found.members["txt"]) == ("k3", picture(3), b"caption 3")
    again = write_shards(samples(5), tmp_path / "b 100%", samples_per_shard=2, origin=ORIGIN)
    assert contents(tmp_path / "a") == contents(tmp_path / "b 100%")
    assert again.fingerprint == manifest.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b 100%"]


def test_the_same_call_is_kept_and_another_refused(tmp_path, caplog):
    first = write_shards(samples(3), tmp_path / "a", samples_per_shard=2, origin=ORIGIN)

    def untouched():
        raise AssertionError("samples of a complete result were asked for")
        yield

    with caplog.at_level(logging.WARNING):
        assert (
            write_shards(untouched(), tmp_path / "a", samples_per_shard=2, origin=ORIGIN).root == first.root
        )
    assert "already complete (3 samples): kept" in caplog.text
    with pytest.raises(ConfigError, match="exists and was not made by this very command"):
        write_shards(untouched(), tmp_path / "a", samples_per_shard=2, origin={**ORIGIN, "seed": 2})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="remove it or choose another folder"):
        write_shards(untouched(), tmp_path / "mine", samples_per_shard=2, origin=ORIGIN)


def test_every_member_has_a_checksum(tmp_path):
    manifest = write_shards(samples(3), tmp_path / "a", samples_per_shard=2, origin=ORIGIN)
    for shard in range(2):
        assert (read_shard_index(manifest.sidecar(shard), "").checksums_NE >= 0).all()


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    assert write_shards(samples(1), tmp_path / "a", samples_per_shard=2, origin=ORIGIN).num_samples == 1


def test_nothing_is_left_of_a_failure(tmp_path):
    def failing():
        yield from samples(3)
        raise DataError("the source broke")

    with pytest.raises(DataError, match="the source broke"):
        write_shards(failing(), tmp_path / "a", samples_per_shard=2, origin=ORIGIN)
    with pytest.raises(DataError, match="no usable samples"):
        write_shards(iter(()), tmp_path / "a", samples_per_shard=2, origin=ORIGIN)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="samples_per_shard=0 must be at least 1"):
        write_shards(samples(1), tmp_path / "a", samples_per_shard=0, origin=ORIGIN)


def test_long_keys(tmp_path):
    key = "folder/" + "x" * 300
    sample = {"__key__": key, "png": picture(0), "txt": b"caption"}
    manifest = write_shards([sample], tmp_path / "a", samples_per_shard=2, origin=ORIGIN)
    assert LocalStorage(manifest).read(Place(0, 0)).key == key


def _write_little(out, sent):
    """Write shards in a process that may not write as much."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    samples = ({"__key__": str(n), "png": bytes(30_000), "txt": b"x"} for n in range(100))
    try:
        write_shards(samples, out, samples_per_shard=50, origin={})
    except DiskFullError as error:
        sent.put(str(error))


def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on file size stands for a full disk: the same failing write, without filling one."""
    context = multiprocessing.get_context("fork")
    sent = context.Queue()
    child = context.Process(target=_write_little, args=(tmp_path / "a", sent))
    child.start()
    message = sent.get(timeout=120)
    child.join()
    assert message.startswith(f"no space left for {tmp_path}/a in {tmp_path} (")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
