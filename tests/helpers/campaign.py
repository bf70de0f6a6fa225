"""Cases and examples of large tests: few in the fast suite, all with `--campaign` (conftest.py)."""

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import settings

FAST_EXAMPLES = 20
"""Hypothesis's examples of a test in the fast suite, where it names no other number."""


def cases(every: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """Return the parameters of a test, those that are not fast marked `campaign`.

    Args:
        every: values of `pytest.mark.parametrize`; tuples for several arguments.
        is_fast: tells which of them the fast suite runs.
    """
    return [
        case
        if is_fast(case)
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.campaign)
        for case in every
    ]


def examples(campaign: int, fast: int = FAST_EXAMPLES) -> settings:
    """Return a decorator that sets how many examples Hypothesis tries, without a limit on the time of one.

    Args:
        campaign: with `--campaign`.
        fast: without it.
    """
    is_fast = settings.get_current_profile_name() == "fast"
    return settings(max_examples=min(fast, campaign) if is_fast else campaign, deadline=None)


def pairwise(every: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return a few of the cases, in which every pair of values of two arguments occurs that any case has.

    Greedy: each case taken covers the most pairs that are left; the first of equals wins.
    """

    def pairs(case: tuple[Any, ...]) -> set[Any]:
        return {
            (one, other, repr(case[one]), repr(case[other]))
            for one, other in combinations(range(len(case)), 2)
        }

    rest = list(every)
    left = set().union(*map(pairs, rest))
    taken = []
    while left:
        best = max(rest, key=lambda case: len(pairs(case) & left))
        taken.append(best)
        left -= pairs(best)
    return taken
