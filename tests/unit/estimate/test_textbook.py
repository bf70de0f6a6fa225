"""The formulas against the numbers that the paper prints."""

import pytest

from kandinsky_dist.estimate.textbook import bytes_per_parameter

# Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 64 ranks, mixed-precision Adam; GB of 10^9 bytes.
FIGURE_1_GB = {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}


@pytest.mark.parametrize(("strategy", "expected_gb"), FIGURE_1_GB.items())
def test_gives_the_figures_of_the_paper(strategy, expected_gb):
    assert bytes_per_parameter(strategy, "bf16", 64).total * 7.5 == pytest.approx(expected_gb, abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_one_rank_holds_what_replicated_ranks_hold_and_a_master_copy(strategy, precision):
    states = bytes_per_parameter(strategy, precision, 1)
    replicated = 16.0 if precision == "bf16" else 4.0 + 4.0 + 4.0 + 8.0
    assert states.total == replicated


def test_fp32_costs_replicated_ranks_what_mixed_precision_costs():
    assert bytes_per_parameter("zero0", "fp32", 8) == bytes_per_parameter("ddp", "bf16", 2)
