"""Collectives take what a sheet of paper says, and fitted lines are those that made the points."""

import pytest

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.estimate.links import GPUS, Group, MeasuredLinks, PublishedLinks, line_through
from kandinsky_dist.telemetry.devices import peak_tflops

LINKS = PublishedLinks(link_rate=400e9, nic_rate=50e9)
NODE, TWO_NODES = Group(8, 1), Group(16, 2)


def test_a_large_message_is_a_matter_of_bandwidth():
    # 7/8 of it passes every GPU of a node once, at its NVLink's rate.
    assert LINKS.seconds("all-gather", 8e9, NODE) == pytest.approx(7e9 / 400e9, rel=0.01)
    assert LINKS.seconds("reduce-scatter", 8e9, NODE) == pytest.approx(7e9 / 400e9, rel=0.01)
    assert LINKS.seconds("all-reduce", 8e9, NODE) == pytest.approx(14e9 / 400e9, rel=0.01)


def test_a_small_message_is_a_matter_of_latency():
    # LL128's base and 7 hops against Simple's, in microseconds.
    assert LINKS.seconds("all-gather", 8, NODE) == pytest.approx((10.0 + 7 * 1.9) * 1e-6, rel=0.01)
    # A tree over 128 nodes beats a ring of 1,024 GPUs.
    assert LINKS.seconds("all-reduce", 8, Group(1024, 128)) == pytest.approx(
        (4.4 + 2 * (7 * 1.2 + 7 * 8.5)) * 1e-6, rel=0.01
    )


def test_a_ring_leaves_a_node_through_all_its_nics():
    assert LINKS.seconds("all-gather", 16e9, TWO_NODES) == pytest.approx(15e9 / 400e9, rel=0.01)
    slow = PublishedLinks(link_rate=400e9, nic_rate=10e9)
    assert slow.seconds("all-gather", 16e9, TWO_NODES) == pytest.approx(15e9 / 80e9, rel=0.01)
    # One GPU of each node has one NIC.
    assert LINKS.seconds("all-gather", 2e9, Group(2, 2)) == pytest.approx(1e9 / 50e9, rel=0.01)


def test_one_rank_waits_for_nobody():
    assert LINKS.seconds("all-reduce", 1e9, Group(1, 1)) == 0.0


def test_nodes_that_cannot_be_filled_are_refused():
    assert Group.of(4, 8) == Group(4, 1)
    assert Group.of(64, 8) == Group(64, 8)
    with pytest.raises(ConfigError, match="17 GPUs do not fill 3 nodes of 8 evenly"):
        Group.of(17, 8)


def test_a_measured_line_comes_back():
    points = [(size, 30e-6 + size / 2e9) for size in (4096, 65536, 2**20, 2**24)]
    assert line_through(points) == pytest.approx((30e-6, 1 / 2e9))
    links = MeasuredLinks.fitted({"all-reduce": points}, 2)
    assert links.seconds("all-reduce", 2**20, Group(2, 1)) == pytest.approx(30e-6 + 2**20 / 2e9)
    # Three times the hops; 3/4 of the bytes instead of 1/2.
    assert links.seconds("all-reduce", 2**20, Group(4, 1)) == pytest.approx(90e-6 + 1.5 * 2**20 / 2e9)


@pytest.mark.parametrize(
    ("points", "line"),
    [([(1, 3.0), (2, 3.0)], (3.0, 0.0)), ([(1, 1.0), (2, 4.0)], None), ([(5, 10.0)], (0.0, 2.0))],
)
def test_neither_latency_nor_time_by_byte_is_negative(points, line):
    found = line_through(points)
    assert min(found) >= 0
    assert line is None or found == pytest.approx(line)


def test_every_gpu_has_a_peak_and_a_source():
    for gpu in GPUS.values():
        assert peak_tflops(gpu.device_name), gpu
        assert gpu.source
