"""However the work is cut, reduced and recomputed: after 20 steps the weights are those of one process."""

import os
from itertools import product
from pathlib import Path

import pytest
from dist.programs import train_each
from helpers import forked
from helpers.command import DEFAULTS, STAGE_DEFAULTS

from kandinsky_dist.checkpoint.layout import CheckpointReader

pytestmark = pytest.mark.dist

NUM_STEPS = 20
GLOBAL_BATCH_SIZE = 12
TOLERANCE = 1e-6
"""Of fp32 weights of size 0.1 to 1, in steps of 1e-3: sums in another order, 20 times."""
BUCKETS_MIB = ({"parallel.bucket_mib": 0.05}, {"parallel.bucket_mib": 25.0})
GATHERING = ({"parallel.reshard_after_forward": False}, {"parallel.prefetch_blocks": 0})
# Name -> strategy, world size, what all its cases share, and its ways to communicate.
ENGINES = {
    "ddp": ("ddp", 2, {}, BUCKETS_MIB),
    "fsdp2": ("fsdp2", 2, {}, GATHERING),
    "hsdp": ("fsdp2", 4, {"parallel.shard_size": 2}, GATHERING),
    "zero0": ("zero0", 2, {}, BUCKETS_MIB),
    "zero1": ("zero1", 2, {}, BUCKETS_MIB),
    "zero2": ("zero2", 2, {}, BUCKETS_MIB),
    "zero3": ("zero3", 2, {}, BUCKETS_MIB),
}


def combinations(ways):
    """Micro-batches x ways to communicate x recomputation: all in a campaign, else each value once."""
    every = list(product((1, 3), ways, (False, True)))
    return every if "KANDINSKY_DIST_CAMPAIGN" in os.environ else [every[0], every[-1]]


@pytest.fixture(scope="module")
def base(tiny_models, small_corpus):
    return {
        **DEFAULTS,
        **STAGE_DEFAULTS["prior"],
        "model.prior": str(tiny_models / "prior"),
        "data.shards": str(small_corpus / "train"),
        "data.num_workers": 0,
        "data.global_batch_size": GLOBAL_BATCH_SIZE,
        "run.max_steps": NUM_STEPS,
        "checkpoint.every_steps": NUM_STEPS,
        "telemetry.log_every_steps": NUM_STEPS,
        "optim.weight_decay": 0.01,
        # With the usual 1e-8 AdamW takes whole steps of gradients that are nothing but rounding, as that of a
        # key's bias, which is 0. With this its steps are in proportion to gradients of the size we have.
        "optim.adam_epsilon": 1e-4,
    }


def weights(run_dir: Path):
    reader = CheckpointReader(run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}")
    return {name: reader.read(name, "master", 0, numel) for name, numel in reader.numels.items()}


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    """The weights of a single process without accumulation."""
    run_dir = tmp_path_factory.mktemp("one")
    settings = {**base, "data.micro_batch_size": GLOBAL_BATCH_SIZE, "run.dir": str(run_dir)}
    done = forked.call(train_each, "prior", [settings])
    assert done.returncode == 0, done.stderr
    return weights(run_dir)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_those_of_one_process(engine, base, one_process, tmp_path):
    strategy, world_size, shared, ways = ENGINES[engine]
    cases = [
        {
            **base,
            **shared,
            **way,
            "run.dir": str(tmp_path / f"{number}"),
            "parallel.strategy": strategy,
            "parallel.gradient_checkpointing": is_recomputed,
            "data.micro_batch_size": GLOBAL_BATCH_SIZE // (world_size * num_micro),
        }
        for number, (num_micro, way, is_recomputed) in enumerate(combinations(ways))
    ]
    done = forked.call(train_each, "prior", cases, world_size=world_size, timeout=500)
    assert done.returncode == 0, done.stderr
    largest = 0.0
    for case in cases:
        found = weights(Path(case["run.dir"]))
        assert found.keys() == one_process.keys()
        largest = max(
            largest, *(float((found[name] - expected).abs().max()) for name, expected in one_process.items())
        )
    print(f"{engine}: {len(cases)} cases, largest difference of a weight {largest:.1e}")
    assert largest <= TOLERANCE
