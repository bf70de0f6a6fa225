"""Figures read alike wherever they are shown."""

import pytest

from kandinsky_dist.runtime.words import duration, rate


@pytest.mark.parametrize(
    ("samples_per_second", "text"),
    [(0.052574, "0.05257"), (52.574, "52.57"), (999.96, "1000"), (87386.6, "87,387")],
)
def test_a_rate_has_four_digits_however_fast(samples_per_second, text):
    assert rate(samples_per_second) == f"{text} samples/s"


def test_a_duration_is_whole_seconds():
    assert duration(970.4) == "0:16:10"
    assert duration(2 * 86400 + 3 * 3600) == "2 days, 3:00:00"
