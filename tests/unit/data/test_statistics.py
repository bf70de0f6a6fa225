import numpy as np
import pytest
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.checking.statistics import EXACT, Histogram, prints_of, repeats

numbers = st.lists(st.integers(0, 2**30) | st.integers(0, 200), min_size=1, max_size=60)


def histogram_of(values):
    histogram = Histogram()
    histogram.add(values)
    return histogram


@examples(100)
@given(numbers, numbers)
def test_in_parts_or_at_once_it_is_the_same(first, second):
    parts, whole = histogram_of(first), histogram_of(first + second)
    parts.merge(histogram_of(second))
    parts.merge(Histogram())
    assert np.array_equal(parts.counts_K, whole.counts_K)
    for histogram in (parts, whole):
        assert histogram.count == len(first + second)
        assert histogram.total == sum(first + second)
        assert (histogram.least, histogram.most) == (min(first + second), max(first + second))


@examples(100)
@given(numbers, st.integers(0, 100))
def test_quantiles_are_near(values, percent):
    rank = max(0, -(-percent * len(values) // 100) - 1)
    expected = sorted(values)[rank]
    found = histogram_of(values).quantile(percent / 100)
    assert found == expected if expected < EXACT else abs(found - expected) <= 0.016 * expected


@given(st.lists(st.integers(0, EXACT - 1), max_size=50), st.integers(0, EXACT - 2))
def test_small_numbers_are_exact(values, limit):
    histogram = histogram_of(values)
    assert histogram.num_above(limit) == sum(value > limit for value in values)
    edges = np.arange(0, EXACT + 1, 4.0)
    assert histogram.between(edges).tolist() == np.histogram(values, edges)[0].tolist()


@given(numbers)
def test_nothing_is_lost_between_edges(values):
    edges = np.linspace(min(values), max(values) + 1, 7)
    assert histogram_of(values).between(edges).sum() == pytest.approx(len(values))


def test_of_nothing():
    histogram = histogram_of([])
    assert (histogram.count, histogram.mean, histogram.quantile(0.5), histogram.num_above(3)) == (0, 0, 0, 0)
    assert histogram.between(np.array([0.0, 10.0])).tolist() == [0.0]
    assert repeats([]).share == 0


@examples(50)
@given(st.lists(st.integers(-1, 5), max_size=40), st.integers(1, 3))
def test_repeats(checksums, one_in):
    checksums_n = np.array(checksums, np.int64)
    prints = prints_of(checksums_n, np.full(len(checksums), 7), one_in)
    if one_in == 1:
        known = [checksum for checksum in checksums if checksum >= 0]
        found = repeats([prints[:3], prints[3:]])
        assert found.num_compared == len(known)
        assert found.num_repeated == len(known) - len(set(known))
        assert found.most_alike == max((known.count(checksum) for checksum in known), default=0)
    else:  # all copies of a kind, or none
        kept, counts = np.unique(prints >> np.uint64(32), return_counts=True)
        for checksum, count in zip(kept.tolist(), counts.tolist(), strict=True):
            assert count == checksums.count(checksum)
