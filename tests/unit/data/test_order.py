"""The order over corpora, weights and buckets: exact in each, whoever asks for which positions."""

from collections import Counter

import numpy as np
import pytest
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.aspects import NUM_ASPECTS, WHOLE
from kandinsky_dist.data.manifest import Manifest, Shard
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order


def corpus(counts_SA: list[list[int]], name: str = "train") -> Manifest:
    """A manifest of shards with these numbers of samples in the first aspect buckets."""
    shards = []
    for number, counts in enumerate(counts_SA):
        full = [*counts, *[0] * (NUM_ASPECTS - len(counts))]
        tar = f"{name}-{number:03d}.tar"
        shards.append(Shard(tar, tar + ".idx", sum(counts), 1000 * sum(counts), "00" * 32, tuple(full)))
    return Manifest.of("", shards)


counts = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=3), min_size=1, max_size=6).filter(
    lambda shards: sum(map(sum, shards)) > 0
)


def triples(order: Order, positions) -> list[tuple[int, int, int]]:
    return [(place.shard, place.index, place.aspect) for place in order.locate(positions).each()]


@given(counts=counts, seed=st.integers(0, 50), epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once(counts, seed, epoch):
    order = Order([corpus(counts)], seed=seed)
    places = triples(order, np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples))
    assert len(set(places)) == len(places) == order.num_samples
    assert all(index < sum(counts[shard]) and aspect == WHOLE for shard, index, aspect in places)


@given(parts=st.lists(counts, min_size=2, max_size=3), seed=st.integers(0, 50), data=st.data())
@examples(40, fast=8)
def test_a_mixture_keeps_its_shares_and_each_corpus_its_epochs(parts, seed, data):
    manifests = [corpus(part, f"c{number}") for number, part in enumerate(parts)]
    weights = [data.draw(st.integers(1, 5)) for _ in parts]
    order = Order(manifests, seed=seed, weights=weights)
    first_shards = np.cumsum([0, *map(len, manifests)])
    seen: list[list] = [[] for _ in parts]
    for place in triples(order, np.arange(8192)):  # two periods
        owner = int(np.searchsorted(first_shards, place[0], "right")) - 1
        seen[owner].append(place)
    for manifest, weight, places in zip(manifests, weights, seen, strict=True):
        assert abs(len(places) - 8192 * weight / sum(weights)) <= len(parts)
        uses = Counter(places)
        whole_epochs = len(places) // manifest.num_samples
        # Two whole periods: all turns up to there have been dealt out, so counts are exact.
        assert max(uses.values()) - min([*uses.values(), whole_epochs]) <= 1


@given(counts=counts, batch=st.integers(1, 12), seed=st.integers(0, 50))
@examples(60)
def test_buckets_fill_whole_batches_and_repeat_nothing(counts, batch, seed):
    manifest = corpus(counts)
    order = Order([manifest], seed=seed, bucket_samples=batch)
    num_batches = 3 * -(-manifest.num_samples // batch) + 3
    places = triples(order, np.arange(num_batches * batch))
    for first in range(0, len(places), batch):
        assert len({aspect for _, _, aspect in places[first : first + batch]}) == 1
    totals = manifest.aspect_counts_SA.sum(0)
    for aspect in np.flatnonzero(totals):
        uses = Counter(place for place in places if place[2] == aspect)
        num_uses = sum(uses.values())
        for (shard, index, _), times in uses.items():
            assert index < counts[shard][aspect]
            # Batches of a bucket's period are shuffled: a begun epoch may run ahead of an unfinished one.
            assert times <= num_uses // totals[aspect] + 2
        # Each bucket has its share of the batches, to within a batch a period.
        share = num_batches * totals[aspect] / manifest.num_samples
        assert abs(num_uses / batch - share) <= totals[aspect] / batch + NUM_ASPECTS + 2


def test_buckets_are_exact_over_whole_periods():
    counts = [[8, 24], [16, 0], [8, 8]]
    order = Order([corpus(counts)], seed=1, bucket_samples=8)
    for epoch in range(3):
        places = triples(order, np.arange(epoch * 64, (epoch + 1) * 64))
        assert len(set(places)) == 64, "every sample of every bucket once an epoch: 64 is whole batches"


@given(
    counts=counts,
    batch=st.sampled_from([12, 24]),
    start=st.integers(0, 10**7),
    world_sizes=st.permutations([1, 2, 3, 4]),
)
@examples(30, fast=10)
def test_world_size_changes_nothing(counts, batch, start, world_sizes):
    order = Order([corpus(counts)], seed=7, bucket_samples=batch)
    base = start * batch
    for world_size in world_sizes:
        together: dict[int, tuple] = {}
        for rank in range(world_size):
            fresh = Order([corpus(counts)], seed=7, bucket_samples=batch)
            mine = np.arange(base + rank, base + 4 * batch, world_size)
            together.update(zip(mine.tolist(), triples(fresh, mine), strict=True))
        assert [together[position] for position in sorted(together)] == triples(
            order, np.arange(base, base + 4 * batch)
        )


@given(counts=counts, position=st.integers(0, 10**9), bucket=st.sampled_from([None, 6]))
@examples(50)
def test_replacements_are_of_the_same_bucket_and_depend_on_the_position_alone(counts, position, bucket):
    order = Order([corpus(counts)], seed=5, bucket_samples=bucket)
    again = Order([corpus(counts)], seed=5, bucket_samples=bucket)
    ((_, _, aspect),) = triples(order, [position])
    for attempt in range(1, NUM_ATTEMPTS):
        (place,) = order.locate([position], attempt).each()
        assert place == again.locate([position], attempt).each()[0]
        assert place.aspect == aspect
        limit = sum(counts[place.shard]) if aspect == WHOLE else counts[place.shard][aspect]
        assert 0 <= place.index < limit


def test_neighbours_come_before_strangers():
    order = Order([corpus([[100, 0], [100, 0]])], seed=0)
    (place,) = order.locate([17]).each()
    (neighbour,) = order.locate([17], 1).each()
    assert (neighbour.shard, neighbour.index) == (place.shard, (place.index + 1) % 100)


def test_weights_are_taken_as_written():
    order = Order([corpus([[10, 0]], "a"), corpus([[10, 0]], "b")], seed=0, weights=[0.1, 0.3])
    shards = [shard for shard, _, _ in triples(order, np.arange(4096))]
    assert Counter(shards) == {0: 1024, 1: 3072}


def test_equal_corpora_are_not_walked_through_in_step():
    order = Order([corpus([[50, 0]], "a"), corpus([[50, 0]], "b")], seed=0, weights=[1, 1])
    places = triples(order, np.arange(100))
    walks = [[index for shard, index, _ in places if shard == number] for number in (0, 1)]
    assert walks[0] != walks[1]


@pytest.mark.parametrize("attempt", [-1, NUM_ATTEMPTS])
def test_there_are_only_so_many_attempts(attempt):
    with pytest.raises(AssertionError):
        Order([corpus([[4, 0]])], seed=0).locate([0], attempt)
