"""The model of time against published runs: two of them are fitted, the others predicted."""

import pytest

from kandinsky_dist.estimate.forecast import DEFAULT_FIXED_SECONDS, DEFAULT_MFU
from kandinsky_dist.estimate.links import GPUS
from kandinsky_dist.estimate.published import MLPERF, NUM_FITTED, fitted, predicted_seconds, steady_scaling

TOLERANCE = 0.15
# 33.4 % of an H100's peak at 137.3 images a second, as published for 8 of them.
FLOPS_PER_IMAGE = 0.334 * GPUS["h100"].peak_flops / 137.3


@pytest.mark.parametrize("point", MLPERF, ids=lambda point: str(point.num_gpus))
def test_a_step_is_predicted_within_15_percent(point):
    assert predicted_seconds(point, fitted()) == pytest.approx(point.seconds, rel=TOLERANCE)


def test_what_is_fitted_fits_and_nothing_else_is_fitted():
    deviations = [abs(predicted_seconds(point, fitted()) / point.seconds - 1) for point in MLPERF]
    assert max(deviations[:NUM_FITTED]) < 1e-6
    assert min(deviations[NUM_FITTED:]) > 0.01, "a point that is met this well was fitted"


def test_scaling_was_lost_to_small_micro_batches():
    """The shape of the published curve: with the first run's micro-batch the last keeps its rate."""
    last = MLPERF[-1]
    assert steady_scaling(last, fitted()) > 0.9 > 2 * last.scaling


def test_the_defaults_are_what_these_runs_say():
    compute = fitted()
    assert pytest.approx(compute.fixed, rel=0.01) == DEFAULT_FIXED_SECONDS
    mfu = FLOPS_PER_IMAGE / compute.per_sample / GPUS["h100"].peak_flops
    assert mfu == pytest.approx(DEFAULT_MFU, rel=0.01)
