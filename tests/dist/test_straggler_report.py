"""The rank that all others wait for is in the log entries."""

import pytest
from dist.watch_programs import one_slow_rank
from helpers.command import DEFAULTS, metrics
from helpers.forked import run_on_ranks

from kandinsky_dist.status.collect import collect

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("strategy", "slow_rank"), [("ddp", 0), ("fsdp2", 2)])
def test_a_rank_that_is_slow_by_itself_is_named(strategy, slow_rank, tiny_models, small_corpus, tmp_path):
    """Slow by so much that what else this machine does cannot make another rank slower."""
    settings = {
        **DEFAULTS,
        "model.prior": str(tiny_models / "prior"),
        "data.shards": str(small_corpus / "train"),
        "data.micro_batch_size": 1,
        "run.dir": str(tmp_path),
        "run.max_steps": 5,
        "parallel.strategy": strategy,
        "telemetry.report_to": [],
    }
    run_on_ranks(one_slow_rank, 4, settings, slow_rank, 20.0)
    entries = metrics(tmp_path)[:-1]  # the last step has no next batch to encode, so nothing slows it
    named = [entry.get("straggler_rank") for entry in entries]
    assert named[0] is None, "once is no pattern"
    assert named[-2:] == [slow_rank] * 2
    assert entries[-1]["straggler_excess"] > 0.3
    assert collect(tmp_path).stragglers[slow_rank] >= 2
