import errno
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading

import pytest

from kandinsky_dist.data.remote import cache as cache_module
from kandinsky_dist.data.remote.cache import BlockCache
from kandinsky_dist.errors import DataError

BLOCK = 64 * 1024
CONTENT = {block: random.Random(block).randbytes(BLOCK) for block in range(64)}


def make(folder, max_blocks=100):
    return BlockCache(folder, max_blocks * (BLOCK + 100), BLOCK)


def never():
    raise AssertionError("fetched though it was there")


def kept(folder):
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def block_files(folder):
    return sorted(folder.glob("??/*"))


def test_a_block_is_fetched_once(tmp_path):
    cache = make(tmp_path / "new" / "folder")
    assert cache.get("s3://a/b?secret", "1", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert cache.get("s3://a/b?secret", "1", 0, never) == CONTENT[0]
    assert pickle.loads(pickle.dumps(cache)).get("s3://a/b?secret", "1", 0, never) == CONTENT[0]
    assert cache.get("s3://a/b?secret", "2", 0, lambda: b"new version") == b"new version"
    assert cache.get("s3://a/b?secret", "1", 1, lambda: b"short") == b"short"
    assert cache.get("s3://a/b?secret", "1", 2, lambda: b"") == b""
    assert cache.get("s3://a/b?secret", "1", 2, never) == b""
    names = [path.name for path in (tmp_path / "new" / "folder").rglob("*")]
    assert not [name for name in names if "secret" in name or "b?" in name or name.endswith(".part")]


@pytest.mark.parametrize("page_bytes", [1000, BLOCK, 10 * BLOCK])
def test_parts_of_a_block(tmp_path, monkeypatch, page_bytes):
    monkeypatch.setattr(cache_module, "PAGE_BYTES", page_bytes)
    cache = make(tmp_path)
    for start, end in (
        (0, None),
        (0, 1),
        (999, 1001),
        (1000, 2000),
        (BLOCK - 1, BLOCK),
        (5, 5),
        (BLOCK, None),
        (70, -3),
    ):
        for _ in range(2):
            assert cache.get("x", "", 0, lambda: CONTENT[0], start, end) == CONTENT[0][start:end]


def test_only_what_is_read_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PAGE_BYTES", 1000)
    cache = make(tmp_path)
    cache.get("x", "", 0, lambda: CONTENT[0])
    (path,) = block_files(tmp_path)
    with path.open("r+b") as file:
        file.seek(1500)
        file.write(bytes(5))
    assert cache.get("x", "", 0, never, 2000, 3000) == CONTENT[0][2000:3000]
    assert cache.get("x", "", 0, lambda: CONTENT[0], 900, 1100) == CONTENT[0][900:1100]
    assert cache.get("x", "", 0, never) == CONTENT[0]


@pytest.mark.parametrize("kept_bytes", [0, 3, 20, 1000, BLOCK, -1])
def test_a_corrupt_block_is_fetched_again(tmp_path, kept_bytes):
    cache = make(tmp_path)
    cache.get("x", "", 0, lambda: CONTENT[0])
    (path,) = block_files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:kept_bytes])
    assert cache.get("x", "", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert path.read_bytes() == data


def test_size_is_bounded_and_the_last_used_stay(tmp_path):
    cache = make(tmp_path, max_blocks=10)
    for block in range(60):
        cache.get("x", "", block, lambda block=block: CONTENT[block])
        assert kept(tmp_path) <= cache.max_bytes
        assert cache.get("x", "", 0, never) == CONTENT[0]  # in use all the time
    assert len(block_files(tmp_path)) >= 8
    for block in range(55, 60):
        assert cache.get("x", "", block, never) == CONTENT[block]


def test_a_block_larger_than_the_cache_passes_through(tmp_path):
    cache = BlockCache(tmp_path, 1000, BLOCK)
    for _ in range(2):
        assert cache.get("x", "", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert block_files(tmp_path) == []


def test_a_failed_fetch_leaves_nothing(tmp_path):
    cache = make(tmp_path)

    def fail():
        raise DataError("the server is gone")

    with pytest.raises(DataError, match="the server is gone"):
        cache.get("x", "", 0, fail)

    def refuse():
        raise ConnectionError("not the disk's fault")

    with pytest.raises(ConnectionError):
        cache.get("x", "", 0, refuse)
    assert block_files(tmp_path) == []
    cache.get("x", "", 0, lambda: CONTENT[0])
    assert cache.get("x", "", 0, never) == CONTENT[0]


def test_threads_wait_for_one_fetch(tmp_path):
    cache, num_fetched, found = make(tmp_path), [], []
    started = threading.Barrier(8)

    def fetch():
        num_fetched.append(1)
        return CONTENT[0]

    def work():
        started.wait()
        found.append(cache.get("x", "", 0, fetch))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT[0]] * 8
    assert len(num_fetched) == 1


def _work(cache, number, log, start):
    start.wait()
    order = list(range(40))
    random.Random(number).shuffle(order)

    def fetch(block):
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"%d\n" % block)
        os.close(descriptor)
        return CONTENT[block]

    for block in order:
        if cache.get("x", "", block, lambda block=block: fetch(block)) != CONTENT[block]:
            os._exit(1)


@pytest.mark.parametrize("max_blocks", [100, 5])
def test_processes_share_blocks(tmp_path, max_blocks):
    log = tmp_path / "log"
    log.touch()
    context = multiprocessing.get_context("fork")
    cache, start = make(tmp_path / "cache", max_blocks), context.Event()
    children = [context.Process(target=_work, args=(cache, number, log, start)) for number in range(3)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 3
    fetched = sorted(map(int, log.read_text().split()))
    if max_blocks == 100:
        assert fetched == list(range(40))
    else:
        assert set(fetched) == set(range(40))
        assert kept(tmp_path / "cache") <= cache.max_bytes


def _killed_while_writing(cache):
    os.rename = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
    cache.get("x", "", 0, lambda: CONTENT[0])


def _killed_while_fetching(cache):
    cache.get("x", "", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("victim", [_killed_while_writing, _killed_while_fetching])
def test_a_killed_process_leaves_no_lock_and_no_half_block(tmp_path, victim):
    cache = make(tmp_path, max_blocks=10)
    child = multiprocessing.get_context("fork").Process(target=victim, args=(cache,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [path.suffix for path in block_files(tmp_path)] == [".part"]
    for block in range(1, 20):  # what is left over does not survive eviction
        cache.get("x", "", block, lambda block=block: CONTENT[block])
    assert {path.suffix for path in block_files(tmp_path)} == {""}
    assert cache.get("x", "", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert cache.get("x", "", 0, never) == CONTENT[0]


def test_a_killed_process_is_taken_over_from_at_once(tmp_path):
    cache = make(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(cache,))
    child.start()
    child.join(60)
    assert cache.get("x", "", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert [path.suffix for path in block_files(tmp_path)] == [""]


def test_a_full_disk_is_no_error(tmp_path, monkeypatch, caplog):
    cache = make(tmp_path)
    cache.get("x", "", 0, lambda: CONTENT[0])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "write", full)
    fetched = []
    with caplog.at_level(logging.WARNING):
        for block in (1, 2, 0):
            assert (
                cache.get("x", "", block, lambda block=block: fetched.append(block) or CONTENT[block])
                == CONTENT[block]
            )
    assert fetched == [1, 2, 0]  # the block that could not be written was not fetched twice
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"cache in {tmp_path} is not used any more: No space left")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = make(tmp_path / "file" / "cache")
    for _ in range(2):
        assert cache.get("x", "", 0, lambda: CONTENT[0]) == CONTENT[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_damaged_count_is_put_right(tmp_path):
    cache = make(tmp_path, max_blocks=10)
    for block in range(30):
        (tmp_path / "num_bytes").write_text("nonsense" if block % 2 else "0")
        if block % 2 == 0:
            (tmp_path / "num_bytes").unlink()
        cache.get("x", "", block, lambda block=block: CONTENT[block])
        assert kept(tmp_path) <= cache.max_bytes
