import pickle
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.plan import Plan, default_chunk_samples
from kandinsky_dist.errors import DataError

sizes = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 400)), min_size=1, max_size=12).filter(sum)


@given(
    sizes=sizes,
    seed=st.integers(0, 2**63),
    num_lanes=st.integers(1, 80),
    chunk_samples=st.one_of(st.none(), st.integers(1, 60)),
    window_chunks=st.integers(1, 6),
    epoch=st.one_of(st.integers(0, 3), st.just(10**6)),
)
@examples(150)
def test_every_sample_exactly_once_an_epoch(sizes, seed, num_lanes, chunk_samples, window_chunks, epoch):
    plan = Plan(
        sizes, seed=seed, num_lanes=num_lanes, chunk_samples=chunk_samples, window_chunks=window_chunks
    )
    total = sum(sizes)
    assert plan.num_samples == total
    shards, indices = plan.locate(np.arange(epoch * total, (epoch + 1) * total))
    assert shards.dtype == np.int32
    assert indices.dtype == np.int64
    seen = sorted(zip(shards.tolist(), indices.tolist(), strict=True))
    assert seen == [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


@given(sizes=sizes, seed=st.integers(0, 100), data=st.data())
@examples(50)
def test_a_position_does_not_depend_on_what_else_is_asked(sizes, seed, data):
    plan, other = Plan(sizes, seed=seed), pickle.loads(pickle.dumps(Plan(sizes, seed=seed)))
    positions = np.array(data.draw(st.lists(st.integers(0, 10 * sum(sizes)), min_size=1, max_size=50)))
    together = np.stack(plan.locate(positions))
    alone = np.concatenate(
        [np.stack(other.locate(positions[n : n + 1])) for n in range(len(positions))], axis=1
    )
    np.testing.assert_array_equal(together, alone)


@pytest.fixture
def impatient_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_share_a_plan(impatient_threads):
    """As a loader's threads do where they replace damaged samples; each drops what others look up."""
    plan = Plan([64], seed=0, num_lanes=1, chunk_samples=2)
    positions = np.random.default_rng(0).integers(0, 5 * 64, 500)
    expected = [plan.locate([position])[1].item() for position in positions]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda position: plan.locate([position])[1].item(), positions))
    assert found == expected


def test_epochs_and_seeds_differ():
    sizes, total = [500, 300, 200], 1000
    orders = [
        np.stack(Plan(sizes, seed=seed).locate(np.arange(total) + epoch * total))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for one in range(len(orders)):
        for other in range(one):
            share = (orders[one] == orders[other]).all(axis=0).mean()
            assert share < 0.02, (
                f"{share:.1%} of the samples are at the same place in orders {one} and {other}"
            )


def test_small_corpora_are_well_shuffled():
    """Neighbours in the stream are not neighbours in the corpus, and no sample keeps its place."""
    shards, indices = Plan([512] * 6, seed=3).locate(np.arange(3072))
    numbers = shards * 512 + indices
    steps = np.abs(np.diff(numbers))
    assert (steps <= 8).mean() < 0.02
    assert abs(np.corrcoef(numbers, np.arange(3072))[0, 1]) < 0.1


def test_far_positions_are_plain_positions_of_their_epoch():
    """Nothing is carried from 0, and nothing overflows."""
    plan = Plan(np.full(1000, 5000), seed=1)
    for position in (0, 10**8, 10**12, 2**62):
        shards, indices = plan.locate(np.arange(position, position + 64))
        assert len(set(zip(shards.tolist(), indices.tolist(), strict=True))) == 64
        assert shards.max() < 1000
        assert indices.max() < 5000
    assert len(plan._epochs) <= 2


def test_memory_is_bounded_by_chunks():
    plan = Plan(np.full(20, 10**7), seed=0)
    for position in range(0, 10**8, 5 * 10**6):
        plan.locate(np.arange(position, position + 64))
    num_chunks = 20 * -(-(10**7) // 1024)
    held = sum(state.chunks.nbytes + state.slot_ends.nbytes for state in plan._epochs.values())
    held += sum(window.nbytes for window in plan._windows.values())
    assert held <= 2 * 12 * num_chunks + 128 * 4096 * 4


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_read_few_shards_and_never_the_same_sample(world_size):
    plan = Plan(np.full(2000, 4096), seed=5)
    count = 64 * 256  # 256 samples of each lane, all inside its first window
    seen: set[tuple[int, int]] = set()
    for rank in range(world_size):
        shards, indices = plan.locate(np.arange(rank, count, world_size))
        # A window is four chunks, of which the first may be cut, so at most five shards a lane.
        assert len(set(shards.tolist())) <= 5 * 64 // world_size
        mine = set(zip(shards.tolist(), indices.tolist(), strict=True))
        assert not mine & seen
        seen |= mine
    assert len(seen) == count


def test_a_lane_reads_its_window_before_the_next():
    """Reading is front to back but for the window: each lane's windows are disjoint runs of slots."""
    plan = Plan([10_000], seed=0, num_lanes=2, chunk_samples=10, window_chunks=4)
    slots = plan._slots(0, np.arange(10_000))
    for lane in (0, 1):
        mine = slots[lane::2]
        for window in range(0, len(mine), 40):
            part = np.sort(mine[window : window + 40])
            np.testing.assert_array_equal(part, np.arange(part[0], part[0] + len(part)))
            assert part[0] == lane * 5_000 + window


def test_chunk_length_follows_corpus_size():
    assert [default_chunk_samples(size) for size in (1, 500, 3000, 10**5, 10**8, 10**10)] == [
        1,
        1,
        5,
        195,
        1024,
        4769,
    ]
    # 2 MiB of 100 KB images; fewer where the corpus is small, more where there would be too many chunks.
    assert [default_chunk_samples(size, size * 100_000) for size in (10**4, 10**7, 10**9)] == [19, 20, 477]


def test_a_billion_samples_stay_small():
    """A look-up far into 10^9 samples in 10^5 shards; peak memory of it all, by numpy's own accounting."""
    tracemalloc.start()
    try:
        plan = Plan(np.full(100_000, 10_000), seed=1, chunk_samples=default_chunk_samples(10**9, 10**14))
        shards, _ = plan.locate(np.arange(10**9 - 128, 10**9 + 128))  # two epochs at once
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(shards.tolist())) > 100
    assert peak < 256 * 2**20


def test_nothing_to_train_on():
    with pytest.raises(DataError, match="no samples in 2 shards"):
        Plan([0, 0], seed=0)
