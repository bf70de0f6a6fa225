"""When a run counts as diverged: hand-made sequences, and healthy ones that never may."""

import itertools
import random
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.config.schema import GuardConfig
from kandinsky_dist.faults.divergence import Health

NAN, INF = float("nan"), float("inf")
SPIKES = GuardConfig(spike_threshold=6.0, spike_window_steps=10, spike_patience_steps=3)
LEVEL = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.02, 0.98]  # median 1.0, MAD 0.05
LIMIT = 1.0 + 6 * 1.4826 * 0.05


def judge(guard, losses, skipped=None, rescaled=None, *, health=None, first_step=1):
    none = [False] * len(losses)
    return (health or Health()).judge(guard, first_step, losses, skipped or none, rescaled or none)


def test_the_run_of_nonfinite_steps_must_be_whole():
    guard = GuardConfig(max_nonfinite_steps=3)
    assert judge(guard, [1.0, NAN, NAN, 1.0, INF, NAN, 1.0]) is None
    found = judge(guard, [1.0, NAN, 1.0, NAN, INF, NAN])
    assert (found.since_step, found.last_healthy_step) == (4, 3)
    assert found.reason == "3 non-finite steps in a row"


def test_a_step_that_was_skipped_is_nonfinite_whatever_its_loss():
    assert judge(GuardConfig(max_nonfinite_steps=2), [1.0, 1.0, 1.0], [False, True, True]).since_step == 2


def test_a_step_that_was_rescaled_is_neither_bad_nor_healthy_if_its_loss_is_a_number():
    guard, yes = GuardConfig(max_nonfinite_steps=2), [True] * 3
    health = Health()
    assert judge(guard, [1.0, 1.0, 1.0], yes, yes, health=health) is None
    assert (health.last_healthy_step, health.num_nonfinite_steps) == (0, 0)
    assert judge(guard, [1.0, NAN, NAN], yes, yes).since_step == 1
    found = judge(guard, [1.0, 1.0, 1.0, 1.0], [False, *yes], [False, False, True, False])
    assert (found.since_step, found.reason) == (2, "2 non-finite steps in a row")


def test_nonfinite_steps_are_never_a_divergence_where_that_is_switched_off():
    assert judge(GuardConfig(max_nonfinite_steps=0), [NAN] * 1000) is None


def test_the_limit_is_median_and_scale_of_the_window_exactly():
    assert judge(SPIKES, LEVEL + [LIMIT - 1e-9] * 3) is None
    found = judge(SPIKES, LEVEL + [LIMIT + 1e-9] * 3)
    assert found.since_step == 11
    assert "the median of 10 healthy steps is 1" in found.reason


def test_no_spike_before_the_window_is_full():
    assert judge(SPIKES, [*LEVEL[:9], 50.0, 1e3, 1e4, 1e5]).since_step == 11, "50.0 was the tenth"
    assert judge(SPIKES, [*LEVEL[:8], 50.0, 1e3, 1e4, 1e5]) is None


def test_outliers_are_forgiven_and_do_not_become_the_measure():
    health = Health()
    assert judge(SPIKES, [*LEVEL, 50.0, 60.0, 1.0, 70.0, 80.0, 1.0], health=health) is None
    assert max(health.losses) < 2
    assert health.last_healthy_step == 16


def test_a_nonfinite_step_neither_ends_nor_lengthens_a_run_of_spikes():
    assert judge(SPIKES, [*LEVEL, 50.0, NAN, 60.0]) is None
    assert judge(SPIKES, [*LEVEL, 50.0, NAN, 60.0, NAN, 70.0]).since_step == 11


def test_a_lower_loss_is_no_spike_and_a_higher_level_is():
    assert judge(SPIKES, LEVEL + [0.1] * 50) is None
    assert judge(SPIKES, LEVEL + [5.0] * 3) is not None
    assert judge(GuardConfig(), LEVEL + [5.0] * 300) is None, "off by default"


@given(
    cuts=st.lists(st.integers(1, 29), max_size=6),
    bad=st.lists(st.sampled_from([1.0, 1.0, 9.0, NAN]), min_size=20, max_size=20),
)
def test_windows_and_restarts_change_no_verdict(cuts, bad):
    """Judged at once, or in pieces with the memory written to a file in between."""
    guard = GuardConfig(
        max_nonfinite_steps=4, spike_threshold=6.0, spike_window_steps=10, spike_patience_steps=3
    )
    losses = LEVEL + bad
    expected = judge(guard, losses)
    health, found = Health(), None
    edges = [0, *sorted(set(cuts)), len(losses)]
    for first, last in itertools.pairwise(edges):
        if found is None:
            health = Health(**asdict(health))
            found = judge(guard, losses[first:last], health=health, first_step=first + 1)
    assert found == expected


@given(
    seed=st.integers(0, 2**32),
    level=st.floats(1e-3, 1e3),
    noise=st.floats(1e-6, 0.5),
    half_life=st.floats(30, 1e6),
    outlier_share=st.floats(0, 0.05),
)
def test_a_healthy_noisy_loss_never_triggers(seed, level, noise, half_life, outlier_share):
    """Normal noise around a falling level, lone outliers and lone skipped steps among it."""
    draw = random.Random(seed)
    losses, skipped, was_odd = [], [], False
    for step in range(600):
        loss = level * 0.5 ** (step / half_life) * (1 + noise * draw.gauss(0, 1))
        is_odd = not was_odd and draw.random() < outlier_share
        losses.append(loss * 100 if is_odd and draw.random() < 0.5 else loss)
        skipped.append(is_odd and losses[-1] == loss)
        was_odd = is_odd
    guard = GuardConfig(
        max_nonfinite_steps=3, spike_threshold=6.0, spike_window_steps=50, spike_patience_steps=4
    )
    assert judge(guard, losses, skipped) is None


@given(losses=st.lists(st.floats(0, 1e6), min_size=30, max_size=80))
def test_a_loss_that_never_rises_never_triggers(losses):
    assert judge(SPIKES, sorted(losses, reverse=True)) is None


@pytest.mark.parametrize("window", [10, 37])
def test_memory_is_bounded_by_the_window_and_empty_without_it(window):
    guard = GuardConfig(spike_threshold=6.0, spike_window_steps=window, spike_patience_steps=3)
    health = Health()
    judge(guard, [1.0 + step % 7 for step in range(500)], health=health)
    assert len(health.losses) == window
    judge(GuardConfig(), [1.0], health=health, first_step=501)
    assert health.losses == []
