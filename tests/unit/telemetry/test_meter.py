import random

import pytest
import torch

from kandinsky_dist.telemetry.devices import PEAKS, peak_tflops
from kandinsky_dist.telemetry.meter import Meter

CPU = torch.device("cpu")


class Clock:
    """A clock that only moves when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def step(self, meter: Meter, seconds: float) -> None:
        self.now += seconds
        meter.tick()


def test_rate_times_seconds_is_samples_over_a_run_with_pauses():
    clock, draw = Clock(), random.Random(0)
    meter = Meter(48, CPU, clock)
    with meter.pause():  # restore
        clock.now += 77.0
    clock.step(meter, 60.0)  # compilation
    trained_seconds, num_steps, reported_samples = 0.0, 0, 0.0
    window_seconds = 0.0
    for step in range(2, 301):
        seconds = draw.uniform(0.5, 2.0)
        clock.step(meter, seconds)
        trained_seconds, window_seconds, num_steps = (
            trained_seconds + seconds,
            window_seconds + seconds,
            num_steps + 1,
        )
        if step % 10 == 0:
            reported_samples += meter.report(0.0)["samples_per_second"] * window_seconds
            window_seconds = 0.0
        if step % 37 == 0:  # between two reports, so that a pause falls into a window
            with meter.pause():
                clock.now += draw.uniform(10.0, 1000.0)
    assert reported_samples == pytest.approx(48 * num_steps, rel=0.01)
    assert num_steps == 299


def test_first_step_is_left_out_of_the_rates():
    clock = Clock()
    meter = Meter(8, CPU, clock)
    clock.step(meter, 500.0)
    for _ in range(4):
        clock.step(meter, 0.5)
    figures = meter.report(0.0)
    assert figures["step_seconds"] == pytest.approx(0.5)
    assert figures["samples_per_second"] == pytest.approx(16.0)


def test_report_after_the_first_step_alone_gives_that_step():
    clock = Clock()
    meter = Meter(8, CPU, clock)
    clock.step(meter, 4.0)
    assert meter.report(0.0)["step_seconds"] == pytest.approx(4.0)
    clock.step(meter, 0.5)
    assert meter.report(0.0)["step_seconds"] == pytest.approx(0.5)


def test_report_without_a_step_gives_no_rate():
    meter = Meter(8, CPU, Clock())
    assert set(meter.report(0.0)) == {"peak_memory_gib"}


def test_nested_pause_counts_once_and_ends_on_an_error():
    clock = Clock()
    meter = Meter(8, CPU, clock)
    clock.step(meter, 1.0)

    def validate_and_fail() -> None:
        with meter.pause():
            clock.now += 3.0
            with meter.pause():
                clock.now += 3.0
            raise RuntimeError("validation failed")

    with pytest.raises(RuntimeError):
        validate_and_fail()
    clock.step(meter, 2.0)
    assert meter.report(0.0)["step_seconds"] == pytest.approx(2.0)


def test_data_wait_is_a_share_of_the_whole_window():
    clock = Clock()
    meter = Meter(8, CPU, clock)
    clock.step(meter, 6.0)  # of which 5 s waited for the first batch
    for _ in range(4):
        clock.step(meter, 1.0)
    assert meter.report(5.0)["data_wait_fraction"] == pytest.approx(0.5)
    clock.step(meter, 1.0)
    assert meter.report(7.0)["data_wait_fraction"] == 1.0


def test_flops_are_those_of_the_steps_in_the_rates_and_absent_where_unknown():
    clock = Clock()
    known, unknown = Meter(64, CPU, clock), Meter(64, CPU, clock)

    def steps(*flops: float) -> dict[str, float]:
        for value in flops:
            clock.now += 2.0
            known.tick(value)
            unknown.tick()
        assert "tflops_per_second" not in unknown.report(0.0)
        return known.report(0.0)

    assert steps(8e12)["tflops_per_second"] == pytest.approx(4.0), (
        "the first step, of which alone there is news"
    )
    figures = steps(1e12, 3e12)
    assert figures["tflops_per_second"] == pytest.approx(1.0)
    assert "mfu" not in figures, "a CPU has no published peak"
    assert steps(6e12)["tflops_per_second"] == pytest.approx(3.0)
    assert "tflops_per_second" not in known.report(0.0)


def test_flops_of_the_first_step_are_left_out_with_its_time():
    clock = Clock()
    meter = Meter(64, CPU, clock)
    for seconds, flops in ((100.0, 50e12), (2.0, 3e12), (2.0, 5e12)):
        clock.now += seconds
        meter.tick(flops)
    assert meter.report(0.0)["tflops_per_second"] == pytest.approx(2.0)


def test_peak_memory_of_a_cpu_run_is_that_of_the_process():
    before = Meter(1, CPU).report(0.0)["peak_memory_gib"]
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB, touched
    after = Meter(1, CPU).report(0.0)["peak_memory_gib"]
    assert 0.01 < before <= after < 1024, (before, after)
    assert block.sum() > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_of_a_device_is_its_own_or_none(name, tflops):
    assert peak_tflops(name) == tflops


def test_every_peak_names_its_source():
    assert all(peak.source and peak.tflops > 0 for peak in PEAKS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_run_reports_device_memory_and_mfu_where_the_device_is_known():
    device = torch.device("cuda", 0)
    clock = Clock()
    meter = Meter(2, device, clock)
    block = torch.ones(2**28, device=device)  # 1 GiB
    for _ in range(2):
        clock.now += 1.0
        meter.tick(2e12)
    figures = meter.report(0.0)
    assert figures["peak_memory_gib"] >= block.numel() * 4 / 2**30
    peak = peak_tflops(torch.cuda.get_device_name(device))
    assert ("mfu" in figures) == (peak is not None)
    if peak is not None:
        assert figures["mfu"] == pytest.approx(2.0 / peak)
