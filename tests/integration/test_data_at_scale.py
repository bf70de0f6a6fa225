"""What must not grow: the cost of a far position with its distance, and memory with what was read."""

from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
from helpers.campaign import cases
from helpers.forked import run_on_ranks

from kandinsky_dist.bench.data_contenders import JPEG_SHARDS, training_batches
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.data.manifest import Manifest, concatenate
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.runtime.heap import give_back_freed_memory

pytestmark = pytest.mark.integration


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


@pytest.mark.parametrize("num_read", cases([3000, 20000], lambda num_read: num_read == 3000))
def test_memory_of_a_worker_is_flat(num_read, tmp_path: Path):
    """Photographs of 1024 pixels; over 640 of them memory still rises by 8% as the workers warm up.

    In a process of its own: workers begin with the free memory of the one that they come from. Medians, as a
    look that falls on a batch being handed over finds one batch more than the next.
    """
    JPEG_SHARDS.write(tmp_path / "shards", 64)
    (private,) = run_on_ranks(private_memory, 1, str(tmp_path / "shards"), num_read)
    early = median(value for count, value in private.items() if 0.2 * num_read < count <= 0.6 * num_read)
    late = median(value for count, value in private.items() if count > 0.6 * num_read)
    print(f"private memory of a worker: {early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late")
    assert late <= 1.05 * early


def private_memory(shards: str, num_read: int) -> dict[int, int]:
    """Number of samples read so far -> bytes that the larger of two workers has for itself.

    What a worker frees, glibc gives back at once here: by itself it keeps over 100 MiB, and 20 MiB more from
    some moment on, which would hide what is not freed.
    """
    give_back_freed_memory()
    batches = training_batches(shards, 32, 2)
    seen, private = 0, {}
    for clip_BCHW, _ in batches:
        seen += len(clip_BCHW)
        workers = psutil.Process().children(recursive=True)
        private[seen] = max(worker.memory_full_info().uss for worker in workers)
        if seen >= num_read:
            break
    batches.close()
    return private
