"""What must not grow: the cost of a far position with its distance, and memory with what was read."""

import ctypes
import os
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest

from kandinsky_dist.bench.data_contenders import JPEG_SHARDS, training_batches
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.data.manifest import Manifest, concatenate
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.workers import start_worker

pytestmark = pytest.mark.integration

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
NUM_READ = int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "3000"))


def test_a_far_position_costs_what_a_near_one_does(tmp_path):
    """10^9 samples in 10^5 shards, which are all the same file: real sidecars and reads, a simulated size."""
    samples = ({"__key__": f"{n:05d}", "jpg": b"x", "txt": b"a caption"} for n in range(10_000))
    write_shards(samples, tmp_path / "one", samples_per_shard=10_000, origin={})
    one = read_manifest(str(tmp_path / "one"))
    many = concatenate([one, one])
    repeat = np.full(100_000, 0)
    manifest = Manifest(
        many.root,
        type(many.tars).of([many.tars[0]] * 100_000),
        type(many.sidecars).of([many.sidecars[0]] * 100_000),
        many.num_samples_S[repeat],
        many.num_bytes_S[repeat],
        many.fingerprints_SF[repeat],
        many.aspect_counts_SA[repeat],
    )
    assert manifest.num_samples == 10**9
    calls = {}
    for position in (0, 10**8):
        order, storage = Order([manifest], seed=0), CountingStorage(manifest)
        views = Views(clip_size=None, resolution=None, tokenize=None, captions=None, seed=0)
        loader = Loader(
            ShardDataset(order, views, storage), global_batch_size=256, micro_batch_size=256, rank=0,
            world_size=1, num_workers=0, device="cpu",
        )  # fmt: skip
        steps = loader.steps(position)
        (batch,) = next(steps)
        steps.close()
        assert batch.positions_B.tolist() == list(range(position, position + 256))
        calls[position] = storage.num_reads
    assert calls[0] == calls[10**8] == 256


class CountingStorage(LocalStorage):
    num_reads = 0

    def read(self, place, extensions=None):
        self.num_reads += 1
        return super().read(place, extensions)


@pytest.mark.long
def test_memory_of_a_worker_is_flat(tmp_path: Path, monkeypatch):
    """CI reads 3,000 photographs of 1024 pixels; KANDINSKY_DIST_CAMPAIGN=20000 is the whole campaign.

    Of what a worker frees, glibc gives pieces from 128 KiB on back at once here: by itself it keeps over
    100 MiB, and 20 MiB more from some moment on, which would hide what is not freed. Medians, as a look that
    falls on a batch being handed over finds one batch more than the next.
    """

    def start_frugal(worker: int) -> None:
        start_worker(worker)
        for parameter, value in ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 2**17), (M_TRIM_THRESHOLD, 2**17)):
            assert ctypes.CDLL(None).mallopt(parameter, value) == 1

    monkeypatch.setattr("kandinsky_dist.data.loader.start_worker", start_frugal)
    JPEG_SHARDS.write(tmp_path / "shards", 64)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    batches = training_batches(str(tmp_path / "shards"), 32, 2)
    seen, rss = 0, {}
    for clip_BCHW, _ in batches:
        seen += len(clip_BCHW)
        workers = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        rss[seen] = max(worker.memory_full_info().uss for worker in workers)
        if seen >= NUM_READ:
            break
    batches.close()
    early = median(value for count, value in rss.items() if 0.2 * NUM_READ < count <= 0.6 * NUM_READ)
    late = median(value for count, value in rss.items() if count > 0.6 * NUM_READ)
    print(f"private memory of a worker: {early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late")
    assert late <= 1.05 * early
