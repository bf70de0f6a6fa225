"""A few pictures of a corpus, the same ones each time."""

from collections.abc import Iterator

from torch import Tensor

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.rows import Views

READ_AHEAD_BYTES = 64 * 2**20
NUM_THREADS = 4


def first_pictures(shards: str, *, num_samples: int, side: int, batch_size: int) -> Iterator[Tensor]:
    """CLIP's view of a fixed random subset: the first samples that a run with seed 0 would see.

    Args:
        shards: as data.shards.
        num_samples: at most; a smaller corpus is given once.
        side: of the views, pixels.
        batch_size: samples a tensor; the last one may be shorter.

    Yields:
        uint8 (B, 3, side, side).
    """
    order = Order([read_manifest(shards, "shards")], seed=0)
    views = Views(clip_size=side, resolution=None, tokenize=None, captions=None, seed=0)
    storage = make_storage(order.manifest, read_ahead_bytes=READ_AHEAD_BYTES, cache_dir=None, cache_bytes=0)
    dataset = ShardDataset(order, views, storage)
    num_samples = min(num_samples, order.num_samples)
    lists = [
        range(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)
    ]
    for batch in dataset.batches(lists, NUM_THREADS):
        assert batch.clip_pixels_BCHW is not None
        yield batch.clip_pixels_BCHW
