import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data_tars import fail_reads, picture, sample, write_tar

from kandinsky_dist.data import storage as storage_module
from kandinsky_dist.data import tables
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError, SampleError


def test_every_sample_is_what_was_written(make_corpus):
    manifest = make_corpus([3, 0, 2], json=b'{"far": 1}' * 5000)
    storage = LocalStorage(manifest)
    number = 0
    for shard, size in enumerate(manifest.num_samples_S.tolist()):
        for index in range(size):
            found = storage.read(Place(shard, index))
            expected = {
                name.partition(".")[2]: data for name, data in sample(number, json=b'{"far": 1}' * 5000)
            }
            assert (found.key, dict(found.members)) == (f"{number:05d}", expected)
            assert dict(storage.read(Place(shard, index), {"png", "txt"}).members) == {
                "png": picture(number),
                "txt": f"caption {number}".encode(),
            }
            number += 1


def test_members_far_apart_and_empty(tmp_path):
    gap = storage_module.MAX_GAP_BYTES + 1
    write_tar(
        tmp_path / "a.tar", [("a.png", b"image"), ("a.bin", bytes(gap)), ("a.cls", b""), ("a.txt", b"words")]
    )
    storage = LocalStorage(index_shards(str(tmp_path), progress=False))
    assert dict(storage.read(Place(0, 0), {"png", "txt", "cls"}).members) == {
        "png": b"image",
        "cls": b"",
        "txt": b"words",
    }
    assert dict(storage.read(Place(0, 0), ()).members) == {}


def test_descriptors_are_bounded(make_corpus, monkeypatch):
    for module in (storage_module, tables):
        monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 3)
    storage = LocalStorage(make_corpus([1] * 8))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(8):
            assert storage.read(Place(shard, 0)).key == f"{shard:05d}"
    # A descriptor and a mapping a shard.
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3


def test_threads_share_a_storage(make_corpus):
    storage = LocalStorage(make_corpus([5, 5, 5]))
    places = [Place(shard, index) for shard in range(3) for index in range(5)] * 20
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda place: storage.read(place).key, places))
    assert keys == [f"{5 * place.shard + place.index:05d}" for place in places]


def _read_all(storage, order, results):
    results.put([storage.read(Place(shard, index)).key for shard, index in order])


@pytest.mark.parametrize(("method", "num_children"), [("fork", 2), ("spawn", 1)])
def test_processes_share_a_storage(make_corpus, method, num_children):
    storage = LocalStorage(make_corpus([4, 4]))
    storage.read(Place(0, 0))  # open in the parent when it forks
    context = multiprocessing.get_context(method)
    results = context.Queue()
    order = [(shard, index) for shard in (1, 0) for index in range(4)]
    children = [
        context.Process(target=_read_all, args=(storage, order, results)) for _ in range(num_children)
    ]
    for child in children:
        child.start()
    for _ in children:
        assert results.get(timeout=60) == [f"{4 * shard + index:05d}" for shard, index in order]
    for child in children:
        child.join()
    assert storage.read(Place(0, 0)).key == "00000"


def test_pickled_copy_reads(make_corpus):
    storage = LocalStorage(make_corpus([1]))
    storage.read(Place(0, 0))
    assert pickle.loads(pickle.dumps(storage)).read(Place(0, 0)).key == "00000"


def test_vanished_shortened_and_replaced_shards_are_named(make_corpus):
    manifest = make_corpus([2, 2, 2])
    storage = LocalStorage(manifest)
    storage.read(Place(0, 0))
    os.truncate(manifest.tar(0), 1600)
    with pytest.raises(SampleError, match=r"^train-000\.tar:00001: the file ends \d+ bytes before"):
        storage.read(Place(0, 1))
    os.remove(manifest.tar(1))
    with pytest.raises(DataError, match=r"train-001\.tar: No such file .*put the shard back") as caught:
        storage.read(Place(1, 0))
    assert not isinstance(caught.value, SampleError)
    with open(manifest.tar(2), "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(DataError, match=r"train-002\.tar has \d+ bytes, its manifest says \d+") as caught:
        storage.read(Place(2, 0))
    assert not isinstance(caught.value, SampleError)


def test_a_disk_that_is_gone_is_no_damaged_sample(make_corpus):
    manifest = make_corpus([2])
    storage = LocalStorage(manifest)
    storage.read(Place(0, 0))
    fail_reads(Path(manifest.tar(0)))
    with pytest.raises(DataError, match=r"train-000\.tar: cannot be read at byte \d+: Is a dir") as caught:
        storage.read(Place(0, 1))
    assert not isinstance(caught.value, SampleError)


def test_an_open_shard_that_is_replaced_is_read_to_its_end(make_corpus, tmp_path):
    """A new file under the old name is another file: what was open stays as it was."""
    manifest = make_corpus([2])
    storage = LocalStorage(manifest)
    storage.read(Place(0, 0))
    other = write_tar(tmp_path / "other.tar", sample(7) + sample(8))
    os.replace(other, manifest.tar(0))
    assert storage.read(Place(0, 1)).members["png"] == picture(1)


def test_index_of_another_version_is_refused(make_corpus):
    manifest = make_corpus([2])
    write_tar(Path(manifest.tar(0)), sample(1) + sample(0))
    index_shards(str(manifest.root), progress=False)
    with pytest.raises(DataError, match="another version of the shard than the manifest"):
        LocalStorage(manifest).read(Place(0, 0))
