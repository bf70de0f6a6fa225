import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data import interleave
from kandinsky_dist.data.interleave import Interleave

rates = st.lists(st.fractions(min_value=Fraction(1, 50), max_value=30), min_size=1, max_size=6)


@given(rates=rates, seed=st.integers(0, 100), length=st.integers(1, 400))
def test_every_sequence_has_its_turns_in_order_without_a_gap(rates, seed, length):
    owners, numbers = Interleave(rates, seed=seed).locate(np.arange(length))
    for owner in range(len(rates)):
        mine = numbers[owners == owner]
        assert sorted(mine) == list(range(len(mine))) or _gap_is_within_a_period(mine, rates[owner])


def _gap_is_within_a_period(numbers, rate):
    """A period's turns are shuffled: the last one begun may lack some, but none comes twice."""
    missing = set(range(max(numbers, default=-1) + 1)) - set(numbers.tolist())
    return len(set(numbers.tolist())) == len(numbers) and len(missing) <= rate + 1


@given(rates=rates, seed=st.integers(0, 100))
def test_shares_do_not_drift(rates, seed):
    far = 10**9
    owners, numbers = Interleave(rates, seed=seed).locate(np.arange(far, far + 300))
    for owner, rate in enumerate(rates):
        for number in numbers[owners == owner]:
            expected = far * rate / sum(rates)
            # A period's length and one rounding of each sequence: not more, however far away.
            assert abs(number - expected) <= rate * (len(rates) + 1) / sum(rates) + rate + 301


@given(rates=rates, turns=st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
def test_a_turn_does_not_depend_on_what_else_is_asked(rates, turns):
    together = Interleave(rates, seed=3).locate(turns)
    alone = [Interleave(rates, seed=3).locate([turn]) for turn in turns]
    assert together[0].tolist() == [owner[0] for owner, _ in alone]
    assert together[1].tolist() == [number[0] for _, number in alone]


def test_long_periods_are_cut_without_changing_shares(monkeypatch):
    monkeypatch.setattr(interleave, "MAX_PERIOD", 10)
    owners, numbers = Interleave([Fraction(300), Fraction(100)], seed=0).locate(np.arange(4000))
    assert np.bincount(owners).tolist() == [3000, 1000]
    assert sorted(numbers[owners == 1]) == list(range(1000))


def test_threads_share_an_interleave(monkeypatch):
    """Each drops what others have just looked up."""
    monkeypatch.setattr(interleave, "NUM_CACHED_PERIODS", 1)
    shared = Interleave([Fraction(3), Fraction(1)], seed=0)
    turns = np.random.default_rng(0).integers(0, 400, 500)
    expected = [shared.locate([turn])[1].item() for turn in turns]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda turn: shared.locate([turn])[1].item(), turns))
    finally:
        sys.setswitchinterval(before)
    assert found == expected


def test_another_seed_is_another_order():
    orders = [
        Interleave([Fraction(50), Fraction(50)], seed=seed).locate(np.arange(100))[0] for seed in (0, 1)
    ]
    assert orders[0].tolist() != orders[1].tolist()


@pytest.mark.parametrize("rate", [Fraction(1, 3), Fraction(7, 2), Fraction(96, 8)])
def test_a_period_has_exactly_its_share(rate):
    owners, _ = Interleave([rate, Fraction(1)], seed=0).locate(np.arange(1000))
    for length in range(1, 1000):
        share = length * rate / (rate + 1)
        assert abs(np.count_nonzero(owners[:length] == 0) - share) <= rate + 2
