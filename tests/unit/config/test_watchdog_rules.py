"""The watchdog's settings contradict neither one another nor sense."""

import pytest

from kandinsky_dist.config import loader, resolve


def problems(**settings) -> list[str]:
    values = {"data.shards": "x", **{f"watchdog.{name}": value for name, value in settings.items()}}
    resolved = loader.load("prior", None, [loader.Layer("test", values)])
    return list(resolve.problems(resolved, world_size=1))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"step_seconds": 40.0},
            "watchdog.step_seconds=40.0 must be at least 5 x watchdog.heartbeat_seconds",
        ),
        ({"step_seconds": 2000.0}, "watchdog.start_seconds=1800.0 must not be below"),
        (
            {"step_seconds": 2000.0, "start_seconds": 9000.0, "pause_seconds": 1000.0},
            "watchdog.pause_seconds=1000.0 must not be below",
        ),
        ({"heartbeat_seconds": 0.0}, "watchdog.heartbeat_seconds=0.0 must be above 0"),
        ({"step_seconds": -1.0}, "watchdog.step_seconds=-1.0 must be 0 or more"),
        ({"straggler_share": 1.5}, "watchdog.straggler_share=1.5 must be in [0, 1]"),
    ],
)
def test_what_cannot_work_is_refused(settings, line):
    assert problems(**settings)[0].startswith(line)


def test_defaults_and_a_watchdog_that_is_off_pass():
    assert problems() == []
    assert problems(step_seconds=0.0, heartbeat_seconds=100.0) == []
