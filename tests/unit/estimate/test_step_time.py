"""A step is put together as on a sheet of paper, with links on which every byte takes a nanosecond."""

from dataclasses import dataclass
from math import log, sqrt

import pytest

from kandinsky_dist.config.schema import ParallelConfig
from kandinsky_dist.estimate.time import Compute, Traffic, step_time, walk

COUNT = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
TRAFFIC = Traffic(1e6, 1e6, (4e5, 4e5, 2e5), "bf16")


@dataclass(frozen=True)
class Paper:
    """Every byte takes 1 ns a pass, whoever takes part; nothing has a latency."""

    def seconds(self, collective, num_bytes, group):
        return COUNT[collective] * num_bytes * 1e-9 if group.num_ranks > 1 else 0.0


def step(strategy, *, num_micro=1, micro_seconds=0.3, num_ranks=16, traffic=TRAFFIC, **settings):
    more = {
        name: settings.pop(name) for name in ("memory_rate", "num_averages", "jitter") if name in settings
    }
    parallel = ParallelConfig(strategy=strategy, **{"bucket_mib": 0.4 * 1e6 / 2**20, **settings})
    return step_time(
        parallel,
        traffic,
        Paper(),
        num_ranks=num_ranks,
        ranks_per_node=8,
        num_micro=num_micro,
        micro_seconds=micro_seconds,
        **more,
    )


def test_ddp_waits_for_its_last_bucket_only():
    # 4 MB of gradients in 10 buckets of 0.4 MB, each of 0.8 ms; backward of 200 ms fills one every 20 ms.
    found = step("ddp")
    assert found.communication == pytest.approx(8e-3)
    assert found.exposed == pytest.approx(0.8e-3)
    assert found.total == pytest.approx(0.3 + 0.8e-3)


def test_what_backward_is_too_short_for_is_exposed():
    # Backward of 2 ms; the first bucket starts at 0.2 ms, and all follow one another.
    assert step("ddp", micro_seconds=3e-3).exposed == pytest.approx(0.2e-3 + 8e-3 - 2e-3)


def test_without_overlap_everything_is_exposed():
    assert step("ddp", overlap=False).exposed == pytest.approx(8e-3)
    assert step("zero0").exposed == pytest.approx(8e-3)


def test_compressed_gradients_are_half_as_many_bytes():
    assert step("ddp", gradient_compression="bf16").communication == pytest.approx(4e-3)


def test_zero1_gathers_its_weights_after_the_step():
    # bf16: 2 MB in 5 buckets of 0.4 MB; all-reduced beside backward, gathered once in 2 ms.
    found = step("zero1")
    assert found.communication == pytest.approx(4e-3 + 2e-3)
    assert found.exposed == pytest.approx(0.8e-3 + 2e-3)


def test_only_zero2_and_zero3_reduce_in_every_micro_batch():
    for strategy, growth in (("ddp", 0.0), ("zero1", 0.0), ("zero2", 4e-3), ("zero3", 3 * 2e-3)):
        grown = step(strategy, num_micro=2).communication - step(strategy).communication
        assert grown == pytest.approx(growth), strategy


def test_fsdp2_gathers_in_every_micro_batch_and_reduces_in_the_last():
    # Gathers 2 MB twice a micro-batch, reduces 4 MB once.
    assert step("fsdp2").communication == pytest.approx(4e-3 + 4e-3)
    assert step("fsdp2", num_micro=3).communication == pytest.approx(3 * 4e-3 + 4e-3)
    kept = step("fsdp2", reshard_after_forward=False)
    assert kept.communication == pytest.approx(2e-3 + 4e-3)


def test_the_first_gathered_block_and_the_last_reduced_one_are_exposed():
    found = step("fsdp2")
    # Forward: the first block; backward begins with the last one's 0.2 M and ends with the first one's 0.4 M.
    assert found.exposed == pytest.approx(0.8e-3 + 0.4e-3 + 1.6e-3)


def test_copies_inside_nodes_add_an_all_reduce_of_their_share():
    found = step("fsdp2", shard_size=8)
    assert found.communication == pytest.approx(4e-3 + 4e-3 + 2 * 4e-3 / 8)


def test_one_rank_exchanges_nothing():
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        assert step(strategy, num_ranks=1).communication == 0.0


def test_the_update_is_divided_where_its_states_are():
    whole = 1e6 * 36 / 0.8e9
    assert step("ddp", memory_rate=1e9).update == pytest.approx(whole)
    # DeepSpeed reads and writes each gradient once more to clip it.
    for strategy in ("zero1", "zero2", "zero3"):
        clipped_apart = whole / 16 * 40 / 36
        assert step(strategy, memory_rate=1e9).update == pytest.approx(clipped_apart), strategy
    assert step("zero0", memory_rate=1e9).update == pytest.approx(whole)
    assert step("fsdp2", memory_rate=1e9, shard_size=8).update == pytest.approx(whole / 8)
    grown = step("ddp", memory_rate=1e9, num_averages=2).update
    assert grown == pytest.approx(whole + 2 * 1e6 * 32 / 16 / 0.8e9)


def test_the_slowest_of_many_ranks_is_waited_for():
    assert step("ddp", jitter=0.01).waiting == pytest.approx(0.3 * 0.01 * sqrt(2 * log(16)))


def test_a_walk_asks_for_as_many_units_ahead_as_it_may():
    units = [(1.0, 1.0, 0.0)] * 4
    assert walk(units, depth=0) == 8.0
    assert walk(units, depth=1) == 5.0
    # A slow link: its gathers follow one another, and the last unit computes behind them.
    assert walk([(2.0, 1.0, 0.0)] * 4, depth=1) == 9.0
    assert walk([(2.0, 1.0, 0.0)] * 4, depth=3) == 9.0


def test_computing_is_a_line_through_what_was_measured():
    assert Compute.fitted([(8, 0.5), (16, 0.9)], "").seconds(32) == pytest.approx(1.7)
    assert Compute.fitted([(8, 0.5)], "").seconds(16) == pytest.approx(1.0)
