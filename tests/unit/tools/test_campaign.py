"""Which cases run when: the fast suite, the campaign, and its slices."""

import importlib.util
from itertools import chain, combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.campaign import cases, pairwise

NAMES = [f"tests/a/test_{letter}.py::test_{number}" for letter in "abcdef" for number in range(4)]


def kept(asked: str) -> list[str]:
    """Node ids that tests/conftest.py keeps of all tests, every second of which is of the campaign."""
    spec = importlib.util.spec_from_file_location("top_conftest", Path(__file__).parents[2] / "conftest.py")
    assert spec
    assert spec.loader
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    items = [
        SimpleNamespace(
            nodeid=f"{name}[{case}]",
            get_closest_marker=lambda _, is_campaign=number % 2: object() if is_campaign else None,
        )
        for number, name in enumerate(NAMES)
        for case in ("x", "y")
    ]
    left_out: list[SimpleNamespace] = []
    config = SimpleNamespace(
        getoption=lambda _: asked,
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)),
    )
    before = {item.nodeid for item in items}
    conftest.pytest_collection_modifyitems(config, items)
    assert before == {item.nodeid for item in [*items, *left_out]}
    return [item.nodeid for item in items]


def test_the_fast_suite_is_all_but_the_campaign():
    assert kept("none") == [f"{name}[{case}]" for name in NAMES[::2] for case in "xy"]
    assert len(kept("all")) == 2 * len(NAMES)


def test_slices_are_the_campaign_and_cases_of_one_test_share_one():
    slices = [kept(f"{number}/3") for number in range(3)]
    assert sorted(chain.from_iterable(slices)) == sorted(
        f"{name}[{case}]" for name in NAMES[1::2] for case in "xy"
    )
    for found in slices:
        assert {name.replace("[x]", "[y]") for name in found} <= set(found)
    assert sum(map(bool, slices)) > 1


@pytest.mark.parametrize("asked", ["some", "3/3", "1", "-1/3", "a/b"])
def test_what_is_no_slice_is_refused(asked):
    with pytest.raises(pytest.UsageError, match=f"--campaign={asked} must be none, all, or K/N"):
        kept(asked)


def test_cases_mark_what_is_not_fast():
    found = cases([("a", 1), ("b", 2)], lambda case: case[0] == "a")
    assert found[0] == ("a", 1)
    assert found[1].values == ("b", 2)
    assert [mark.name for mark in found[1].marks] == ["campaign"]
    assert cases(["a"], lambda _: False)[0].values == ("a",)


def test_pairwise_has_every_pair_in_few_cases():
    every = list(product("abc", (1, 2, 3), (True, False), "xy"))
    taken = pairwise(every)
    assert len(taken) <= 12 < len(every)
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in taken} == {(case[one], case[other]) for case in every}
