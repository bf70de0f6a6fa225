import functools
import gc
import itertools
import multiprocessing
import pickle
import random
import re
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from data_tars import sample, write_tar
from helpers.campaign import cases
from helpers.servers import Fault, aws_environment, http_server, s3_server

from kandinsky_dist.data import storage as storage_module
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.manifest import Manifest, concatenate
from kandinsky_dist.data.plan import Plan
from kandinsky_dist.data.remote.cache import BlockCache
from kandinsky_dist.data.remote.fetch import Fetcher
from kandinsky_dist.data.remote.object_stream import Policy
from kandinsky_dist.data.remote.remote_storage import RemoteStorage, make_storage
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError, SampleError

# Waits for an answer as long as the real one, for machines under load; only its pauses are shorter.
QUICK = Policy(attempts=3, base_seconds=0.001, cap_seconds=0.01)
IMPATIENT = Policy(attempts=10, base_seconds=0.001, cap_seconds=0.01, window_seconds=0.25, window_bytes=4096)
MIB = 2**20


@functools.cache
def members_of(number):
    """A sample longer than the gap for which neighbours are fetched together."""
    image = random.Random(number).randbytes(storage_module.MAX_GAP_BYTES + number % 7 * 1000)
    return {"png": sample(number)[0][1], "bin": image, "txt": f"caption {number}".encode()}


def write_shards(folder, sizes):
    ends = list(itertools.accumulate(sizes))
    for shard, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        members = [
            (f"{number:05d}.{extension}", data)
            for number in range(end - size, end)
            for extension, data in members_of(number).items()
        ]
        write_tar(folder / f"train-{shard:03d}.tar", members)
    return folder


def remote_manifest(server, folder, sizes):
    """Indexed where they lie, then seen through the server."""
    index_shards(str(write_shards(folder, sizes)), checksums=True, progress=False)
    local = index_shards(str(folder), checksums=True, progress=False)
    return Manifest(
        server.url, local.tars, local.sidecars, local.num_samples_S, local.num_bytes_S,
        local.fingerprints_SF, local.aspect_counts_SA,
    )  # fmt: skip


def remote(manifest, read_ahead_bytes=64 * MIB, policy=QUICK, **arguments):
    return RemoteStorage(manifest, read_ahead_bytes=read_ahead_bytes, fetcher=Fetcher(policy), **arguments)


def places_of(manifest):
    return [
        Place(shard, index)
        for shard, size in enumerate(manifest.num_samples_S.tolist())
        for index in range(size)
    ]


def tar_bytes(server):
    return sum(num for path, num in server.num_bytes.items() if path.endswith(".tar"))


def tar_requests(server):
    return sum(num for path, num in server.num_requests.items() if path.endswith(".tar"))


def assert_right(found, number, extensions=None):
    assert found.key == f"{number:05d}"
    expected = {
        name: data for name, data in members_of(number).items() if extensions is None or name in extensions
    }
    assert dict(found.members) == expected


@pytest.mark.parametrize("is_expected", [True, False])
@pytest.mark.parametrize("is_cached", [True, False])
def test_every_sample_is_what_was_written(tmp_path, is_expected, is_cached):
    with http_server(tmp_path / "shards") as server:
        manifest = remote_manifest(server, tmp_path / "shards", [3, 0, 5])
        cache = BlockCache(tmp_path / "cache", 100 * MIB, 64 * 1024) if is_cached else None
        storage = remote(manifest, cache=cache)
        for extensions in (None, {"png", "txt"}, ()):
            places = places_of(manifest)
            order = random.Random(0).sample(range(8), 8)
            if is_expected:
                storage.expect([places[number] for number in order], extensions)
            for number in order:
                assert_right(storage.read(places[number], extensions), number, extensions)
        # More than what was expected, and another sample than expected.
        storage.expect(places[:4], {"txt"})
        assert_right(storage.read(places[0]), 0)
        assert_right(storage.read(places[7], {"bin"}), 7, {"bin"})


def test_neighbours_are_fetched_together(tmp_path):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [40, 40])
        storage, places = remote(manifest), places_of(manifest)
        storage.expect(random.Random(1).sample(places[10:60], 50))
        for number in range(10, 60):
            assert_right(storage.read(places[number]), number)
        assert server.num_requests["train-000.tar.idx"] == server.num_requests["train-001.tar.idx"] == 1
        assert tar_requests(server) == 2
        # Samples apart from each other are not worth the bytes in between.
        server.forget()
        storage.expect([places[0], places[5], places[6]])
        for number in (0, 5, 6):
            assert_right(storage.read(places[number]), number)
        assert tar_requests(server) == 2
        assert tar_bytes(server) < 3 * 45_000


def test_runs_are_not_longer_than_their_bound(tmp_path):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [100])
        storage, places = remote(manifest, read_ahead_bytes=16 * MIB), places_of(manifest)
        storage.expect(places)
        for number, place in enumerate(places):
            assert_right(storage.read(place), number)
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for _, wanted in server.ranges]
        lengths = [int(ends[2]) + 1 - int(ends[1]) for ends in found if ends]
        assert len(lengths) == -(-sum(lengths) // MIB) == 4
        assert max(lengths) <= MIB
        assert sum(lengths) == tar_bytes(server) <= manifest.num_bytes_S.sum()


@pytest.mark.parametrize("num_threads", [1, 4])
def test_what_is_held_is_bounded(tmp_path, num_threads, monkeypatch):
    """What is on its way or unread is at most the bound, and a run more for each waiting reader."""
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [120, 120])
        storage, places = remote(manifest, read_ahead_bytes=2 * MIB), places_of(manifest)
        ahead, most = storage._ahead, [0]
        begin = ahead._begin

        def watched(run):
            begin(run)
            most[0] = max(most[0], ahead._held_bytes)

        monkeypatch.setattr(ahead, "_begin", watched)
        storage.expect(places)
        numbers = iter(range(len(places)))
        lock = threading.Lock()
        failures = []

        def work():
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    assert_right(storage.read(places[number]), number)
                except BaseException as error:
                    failures.append(error)
                    raise

        threads = [threading.Thread(target=work) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert 0 < most[0] <= (2 + num_threads) * MIB
        assert ahead._held_bytes == 0
        assert not storage._expected


def test_order_of_reading_need_not_be_the_expected_one(tmp_path):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [60, 60])
        storage, places = remote(manifest, read_ahead_bytes=MIB), places_of(manifest)
        storage.expect(places)
        for number in reversed(range(120)):  # each waits for a run behind those that fill the room
            assert_right(storage.read(places[number]), number)
        assert tar_bytes(server) <= manifest.num_bytes_S.sum()
        assert storage._ahead._held_bytes == 0


@pytest.mark.parametrize(
    ("world_size", "num_told"),
    cases(itertools.product([1, 2, 3, 4], [30, 120]), [(1, 120), (2, 30), (3, 120), (4, 30)].__contains__),
)
def test_no_byte_is_fetched_twice_in_an_epoch(tmp_path, world_size, num_told):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [50, 30, 40])
        plan = Plan(manifest.num_samples_S, seed=3, num_lanes=12, chunk_samples=5)
        shards, indices = plan.locate(np.arange(plan.num_samples))
        order = [Place(shard, index) for shard, index in zip(shards.tolist(), indices.tolist(), strict=True)]
        ranks = [remote(manifest) for _ in range(world_size)]
        numbers = np.cumsum([0, 50, 30])
        seen = Counter()
        for first in range(0, len(order), num_told):
            for rank, storage in enumerate(ranks):
                mine = order[first : first + num_told][rank::world_size]
                storage.expect(mine)
                for place in mine:
                    number = int(numbers[place.shard]) + place.index
                    assert_right(storage.read(place), number)
                    seen[number] += 1
        assert seen == Counter(range(120))
        members = sum(len(data) for number in range(120) for data in members_of(number).values())
        headers = 120 * 3 * 1024  # of members, and their padding
        assert members <= tar_bytes(server) <= members + headers
        if num_told == 120:
            assert tar_requests(server) <= 120 / 5  # whole chunks, if whole windows of the lanes are told


def test_cache_is_shared_and_blocks_are_fetched_once(tmp_path):
    with http_server(tmp_path / "shards") as server:
        manifest = remote_manifest(server, tmp_path / "shards", [30, 30])
        cache = BlockCache(tmp_path / "cache", 100 * MIB, 256 * 1024)
        for storage in (
            remote(manifest, cache=cache),
            remote(manifest, cache=pickle.loads(pickle.dumps(cache))),
        ):
            places = places_of(manifest)
            storage.expect(places[::2])
            for number in range(60):
                assert_right(storage.read(places[number]), number)
        blocks = sum(-(-num_bytes // (256 * 1024)) for num_bytes in manifest.num_bytes_S.tolist())
        assert tar_requests(server) <= blocks
        assert tar_bytes(server) <= manifest.num_bytes_S.sum()


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(truncate_bytes=9000), Fault(drip_bytes=9000), Fault(is_silent=True)]
)
def test_faults_on_the_way_heal(tmp_path, fault):
    num_faults = [3]

    def once_a_while(path, wanted):
        num_faults[0] -= path.endswith(".tar")
        return fault if num_faults[0] >= 0 and path.endswith(".tar") else None

    with http_server(tmp_path, once_a_while) as server:
        manifest = remote_manifest(server, tmp_path, [20, 20])
        storage, places = remote(manifest, policy=IMPATIENT), places_of(manifest)
        storage.expect(places)
        for number, place in enumerate(places):
            assert_right(storage.read(place), number)


def test_error_of_a_run_is_raised_by_those_who_need_it(tmp_path):
    gone = []
    with http_server(tmp_path, lambda path, wanted: Fault(status=404) if path in gone else None) as server:
        manifest = remote_manifest(server, tmp_path, [5, 5, 5])
        gone += ["train-001.tar", "train-002.tar.idx"]
        storage, places = remote(manifest), places_of(manifest)
        storage.expect(places)
        for number in range(5):
            assert_right(storage.read(places[number]), number)
        for number in range(5, 10):
            with pytest.raises(DataError, match=r"/train-001\.tar: the server answered 404") as caught:
                storage.read(places[number])
            assert not isinstance(caught.value, SampleError)
        assert server.num_requests["train-001.tar"] == 1  # one run, five readers
        for number in range(10, 15):
            with pytest.raises(DataError, match=r"/train-002\.tar\.idx: the server answered 404"):
                storage.read(places[number])
        gone.clear()  # and it may come back
        assert_right(storage.read(places[7]), 7)
        assert_right(storage.read(places[12]), 12)
        assert storage._ahead._held_bytes == 0


def test_replaced_shard_stops_and_changed_bytes_concern_a_sample(tmp_path):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [5, 5])
        storage, places = remote(manifest), places_of(manifest)
        path = tmp_path / "train-000.tar"
        data = bytearray(path.read_bytes())
        data[data.index(members_of(1)["bin"]) + 50] ^= 1
        path.write_bytes(data)
        assert_right(storage.read(places[0]), 0)
        for _ in range(2):
            with pytest.raises(SampleError, match=r"train-000\.tar:00001: \.bin is not what was indexed"):
                storage.read(places[1])
        assert_right(storage.read(places[1], {"txt"}), 1, {"txt"})
        path.write_bytes(data + bytes(512))
        with pytest.raises(DataError, match="was replaced since it was indexed; index again") as caught:
            storage.read(places[0])
        assert not isinstance(caught.value, SampleError)


def test_bytes_that_changed_on_the_way_are_fetched_again(tmp_path):
    with http_server(tmp_path / "shards") as server:
        manifest = remote_manifest(server, tmp_path / "shards", [5])
        places, cache = places_of(manifest), BlockCache(tmp_path / "cache", 100 * MIB, 64 * 1024)
        path = tmp_path / "shards" / "train-000.tar"
        data = path.read_bytes()
        path.write_bytes(bytes(len(data)))
        storage = remote(manifest, cache=cache)
        with pytest.raises(SampleError):
            storage.read(places[0])
        path.write_bytes(data)
        assert_right(storage.read(places[0]), 0)  # though what is cached is wrong


def test_etag_of_the_index_is_compared(tmp_path):
    with http_server(write_shards(tmp_path / "shards", [4])) as server:
        manifest = index_shards(f"{server.url}/train-000.tar", out=tmp_path / "index", progress=False)
        assert_right(remote(manifest).read(Place(0, 2)), 2)
        path = tmp_path / "shards" / "train-000.tar"
        path.write_bytes(path.read_bytes())  # as long as before, at another time
        storage = remote(manifest)
        storage.expect([Place(0, 2)])
        with pytest.raises(
            DataError, match=r"has the ETag .* it was replaced since it was indexed; index again"
        ):
            storage.read(Place(0, 2))


def test_local_and_remote_shards_mixed(tmp_path):
    with http_server(tmp_path / "far") as server:
        far = remote_manifest(server, tmp_path / "far", [3])
        near = index_shards(str(write_shards(tmp_path / "near", [3])), progress=False)
        both = concatenate([near, far])
        storage = make_storage(both, read_ahead_bytes=MIB, cache_dir=tmp_path / "cache", cache_bytes=MIB)
        assert isinstance(storage, RemoteStorage)
        storage.expect([Place(shard, index) for shard in range(2) for index in range(3)])
        for shard in range(2):
            for index in range(3):
                assert_right(storage.read(Place(shard, index)), index)
        assert isinstance(
            make_storage(near, read_ahead_bytes=MIB, cache_dir=None, cache_bytes=0), LocalStorage
        )


def _read_all(storage, places, results):
    storage.expect(places)
    results.put([storage.read(place).key for place in places])


@pytest.mark.parametrize(("method", "num_children"), [("fork", 2), ("spawn", 1)])
def test_processes_have_their_own_threads(tmp_path, method, num_children):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [4, 4])
        storage, places = remote(manifest), places_of(manifest)
        storage.expect(places)  # threads, connections and held bytes when it forks
        assert_right(storage.read(places[0]), 0)
        context = multiprocessing.get_context(method)
        results = context.Queue()
        with storage._lock, storage._ahead._room:  # and locks that a thread of the parent holds
            children = [
                context.Process(target=_read_all, args=(storage, places, results))
                for _ in range(num_children)
            ]
            for child in children:
                child.start()
            for _ in children:
                assert results.get(timeout=60) == [f"{number:05d}" for number in range(8)]
            for child in children:
                child.join(60)
                assert child.exitcode == 0
        for number in range(1, 8):
            assert_right(storage.read(places[number]), number)


def test_threads_end_with_their_storage(tmp_path):
    with http_server(tmp_path) as server:
        manifest = remote_manifest(server, tmp_path, [4])
        storage = remote(manifest)
        storage.expect(places_of(manifest))
        threads = list(storage._ahead._threads)
        assert threads
        assert all(thread.daemon for thread in threads)
        del storage
        gc.collect()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_program_may_end_while_a_server_is_silent(tmp_path):
    asked = threading.Event()

    def silent(path, wanted):
        if path.endswith(".tar"):
            asked.set()
            return Fault(is_silent=True)
        return None

    code = """
import sys
from kandinsky_dist.data.manifest import load_manifest
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.remote.fetch import fetch_whole
from kandinsky_dist.data.tables import Place
root = sys.argv[1]
manifest = load_manifest(root, "", fetch_whole(root + "/manifest.safetensors"))
storage = make_storage(manifest, read_ahead_bytes=1 << 20, cache_dir=None, cache_bytes=0)
storage.expect([Place(0, index) for index in range(4)])
sys.stdin.readline()
"""
    with http_server(tmp_path, silent) as server:
        remote_manifest(server, tmp_path, [4])
        child = subprocess.Popen(
            [sys.executable, "-c", code, server.url], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert asked.wait(60)
        _, said = child.communicate(b"\n", timeout=10)
        assert (child.returncode, said) == (0, b"")


def test_s3_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [6, 6])
    with s3_server():
        import boto3

        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="storage-test")
        for path in sorted((tmp_path / "shards").glob("*.tar")):
            client.put_object(Bucket="storage-test", Key=f"deep/train/{path.name}", Body=path.read_bytes())
        manifest = index_shards(
            "s3://storage-test/deep/train", out=tmp_path / "index", num_processes=1, progress=False
        )
        storage, places = remote(manifest), places_of(manifest)
        storage.expect(places)
        for number, place in enumerate(places):
            assert_right(storage.read(place), number)
        client.delete_object(Bucket="storage-test", Key="deep/train/train-001.tar")
        with pytest.raises(
            DataError, match=r"^s3://storage-test/deep/train/train-001\.tar: .* 404 NoSuchKey"
        ):
            storage.read(places[8])


def test_expired_credentials_stop_in_one_line(tmp_path):
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    with http_server(tmp_path, lambda path, wanted: Fault(status=400, body=body)) as server:
        local = index_shards(str(write_shards(tmp_path / "near", [3])), progress=False)
        manifest = Manifest(
            str(tmp_path / "near"), type(local.tars).of(["s3://corpus/train-000.tar"]), local.sidecars,
            local.num_samples_S, local.num_bytes_S, local.fingerprints_SF, local.aspect_counts_SA,
        )  # fmt: skip
        with aws_environment(server.url):
            storage = remote(manifest)
            storage.expect(places_of(manifest))
            with pytest.raises(
                DataError, match=r"400 ExpiredToken The provided token has expired\.; renew the cred"
            ):
                storage.read(Place(0, 1))


def test_gap_is_the_storages(tmp_path):
    """Members of a sample that lie far apart are not fetched with what is between them."""
    write_tar(
        tmp_path / "train-000.tar",
        [("a.png", sample(0)[0][1]), ("a.bin", bytes(storage_module.MAX_GAP_BYTES + 1)), ("a.txt", b"words")],
    )
    with http_server(tmp_path) as server:
        local = index_shards(str(tmp_path), progress=False)
        manifest = Manifest(
            server.url, local.tars, local.sidecars, local.num_samples_S, local.num_bytes_S,
            local.fingerprints_SF, local.aspect_counts_SA,
        )  # fmt: skip
        storage = remote(manifest)
        for is_expected in (True, False):
            server.forget()
            if is_expected:
                storage.expect([Place(0, 0)], {"png", "txt"})
            assert storage.read(Place(0, 0), {"png", "txt"}).members["txt"] == b"words"
            assert tar_requests(server) == 2
            assert tar_bytes(server) < 3000
