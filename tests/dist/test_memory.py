"""The memory that ZeRO promises is the memory that two real ranks hold."""

from typing import Any

import pytest
from helpers.campaign import cases

from kandinsky_dist.bench.memory import PRECISIONS, Case, measure
from kandinsky_dist.bench.memory_report import SHARDED, difference, fullest, states, textbook
from kandinsky_dist.estimate.textbook import bytes_per_parameter

pytestmark = pytest.mark.dist

WORLD_SIZE = 2
TOLERANCE = 0.10
NUM_DIVIDED = {"fsdp2": 2, "zero1": 2, "zero2": 3, "zero3": 4}
"""Of weights, gradients, masters and moments, those that each rank holds a share of all the time."""
CASES = [(strategy, precision) for strategy in SHARDED for precision in PRECISIONS]
FAST = [("fsdp2", "fp32"), ("zero1", "bf16"), ("zero3", "bf16")]
"""ZeRO-2 lies between ZeRO-1 and ZeRO-3."""
BY_CASE = pytest.mark.parametrize(("strategy", "precision"), cases(CASES, FAST.__contains__))


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Both ranks' figures of the small prior, at all moments, measured once for the cases that are run."""
    asked = FAST if request.config.getoption("campaign") == "none" else CASES
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        found, device = measure([Case("prior", "small", *case) for case in asked], WORLD_SIZE)
    assert device.startswith("CPU")
    return found


def of_case(rows: list[dict[str, Any]], strategy: str, precision: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["strategy"], row["precision"]) == (strategy, precision)]


@BY_CASE
def test_model_states_are_within_a_tenth_of_the_textbook(rows, strategy, precision):
    measured = of_case(rows, strategy, precision)
    assert {row["rank"] for row in measured} == set(range(WORLD_SIZE))
    assert all(row["num_parameters"] > 60e6 for row in measured)
    for rank in range(WORLD_SIZE):
        (row,) = fullest([row for row in measured if row["rank"] == rank])
        assert abs(difference(row, WORLD_SIZE)) < TOLERANCE, (
            f"{states(row)} is not {textbook(row, WORLD_SIZE)}"
        )


@BY_CASE
def test_each_class_is_the_textbooks_share(rows, strategy, precision):
    (row,) = fullest(of_case(rows, strategy, precision))
    formula = bytes_per_parameter(strategy, precision, WORLD_SIZE)
    for name in ("weights", "gradients", "masters", "moments"):
        expected = getattr(formula, name) * row["num_parameters"]
        assert getattr(states(row), name) == pytest.approx(expected, rel=TOLERANCE), name


@BY_CASE
def test_the_tolerance_notices_any_class_that_is_held_whole(rows, strategy, precision):
    (row,) = fullest(of_case(rows, strategy, precision))
    formula, whole = (bytes_per_parameter(strategy, precision, ranks) for ranks in (WORLD_SIZE, 1))
    divided = [
        name
        for name in ("weights", "gradients", "masters", "moments")
        if getattr(formula, name) < getattr(whole, name)
    ]
    assert len(divided) == NUM_DIVIDED[strategy]
    for name in divided:
        replicated = {**row, f"{name}_bytes": row[f"{name}_bytes"] * WORLD_SIZE}
        assert difference(replicated, WORLD_SIZE) > TOLERANCE, name


@BY_CASE
def test_nothing_large_lives_outside_the_classes(rows, strategy, precision):
    for row in of_case(rows, strategy, precision):
        total = states(row).total
        assert row["buckets_bytes"] < 0.02 * total, row
        assert row["other_bytes"] < 0.01 * total, row
        if row["process_bytes"] is not None:
            # Counted by the operating system: whole states that Python does not see would be there.
            counted = total + row["buckets_bytes"] + row["other_bytes"]
            assert 0.95 * counted < row["process_bytes"] < 1.2 * counted, row
