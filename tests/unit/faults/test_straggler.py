"""The rank that all others wait for is named, and a rank that is only a little slower is not."""

import random

from kandinsky_dist.faults.straggler import Stragglers


def judged(*windows: list[float], share: float = 0.1) -> list[int | None]:
    """Who is named after each window of 10 seconds."""
    found = Stragglers(share)
    return [straggler and straggler.rank for straggler in (found.judge(window, 10.0) for window in windows)]


def test_a_slow_rank_is_named_from_the_second_window_on():
    window = [2.0, 2.1, 4.0, 2.05]
    assert judged(window, window, window) == [None, 2, 2]


def test_how_much_the_others_wait_is_a_share_of_the_step():
    found = Stragglers(0.1)
    window = [2.0, 2.1, 4.1, 2.1]
    assert found.judge(window, 10.0) is None
    first, second = found.judge(window, 10.0), found.judge(window, 10.0)
    assert first.excess == (4.1 - 2.1) / 10
    assert (first.is_news, second.is_news) == (True, False)


def test_a_rank_that_is_slow_once_is_forgiven():
    slow, even = [2.0, 2.0, 9.0], [2.0, 2.0, 2.0]
    assert judged(slow, even, slow, even) == [None] * 4


def test_another_rank_begins_anew():
    assert judged([2.0, 2.0, 9.0], [9.0, 2.0, 2.0], [9.0, 2.0, 2.0]) == [None, None, 0]


def test_less_than_the_share_of_a_step_is_no_matter():
    window = [2.0, 2.0, 2.0, 2.9]
    assert judged(window, window, share=0.1) == [None, None]
    assert judged(window, window, share=0.05) == [None, 3]
    assert judged([0.0, 0.0, 9.0], [0.0, 0.0, 9.0], share=0.0) == [None, None]


def test_ranks_that_differ_widely_have_no_outlier():
    window = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert judged(window, window) == [None, None]


def test_one_of_two_ranks():
    assert judged([2.0, 4.0], [2.0, 4.0]) == [None, 1]


def test_one_rank_alone_and_a_window_without_time():
    assert judged([3.0], [3.0]) == [None, None]
    assert Stragglers(0.1).judge([0.0, 5.0], 0.0) is None


def test_ordinary_noise_names_nobody():
    draw = random.Random(0)
    windows = [[2.0 + draw.gauss(0, 0.2) for _ in range(64)] for _ in range(200)]
    assert set(judged(*windows)) == {None}
