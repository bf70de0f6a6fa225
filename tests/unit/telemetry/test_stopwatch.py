"""Sections of a step add up, and a reading begins anew."""

import pytest
import torch

from kandinsky_dist.telemetry import stopwatch
from kandinsky_dist.telemetry.stopwatch import Stopwatch


def test_what_lies_between_sections_is_not_counted(monkeypatch):
    clock = iter([10.0, 12.0, 50.0, 53.0, 60.0, 61.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    with watch.running():
        pass
    with pytest.raises(ValueError, match="x"), watch.running():
        raise ValueError("x")
    assert watch.read() == 5.0
    assert watch.read() == 0.0
    with watch.running():
        pass
    assert watch.read() == 1.0


@pytest.mark.gpu
def test_the_devices_work_is_counted_not_the_hosts():
    device = torch.device("cuda", 0)
    watch = Stopwatch(device)
    with watch.running():
        torch.cuda._sleep(10**8)  # cycles; the host goes on at once
    assert watch.read() > 0.01
