"""A checkpoint that any strategy wrote loads under any other at any world size: bit for bit, and goes on."""

import json
from pathlib import Path

import pytest
import torch
from dist.programs import go_on_from
from helpers import forked
from helpers.campaign import cases
from helpers.command import DEFAULTS, STAGE_DEFAULTS, losses

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.parallel.base import FRAGMENT_KINDS
from kandinsky_dist.parallel.ds_config import shipped_file

pytestmark = pytest.mark.dist

SAVED_AT, NUM_STEPS = 3, 5
SETTINGS = {
    "run.max_steps": NUM_STEPS,
    "checkpoint.every_steps": SAVED_AT,
    "data.global_batch_size": 24,
    "data.micro_batch_size": 2,
    "data.num_workers": 0,
    "optim.weight_decay": 0.01,
}
# Name -> strategy, its settings, and the world size that it writes at.
ENGINES = {
    "ddp": ("ddp", {}, 2),
    "fsdp2": ("fsdp2", {}, 2),
    "hsdp": ("fsdp2", {"parallel.shard_size": 2}, 4),
    "zero0": ("zero0", {}, 2),
    "zero1": ("zero1", {}, 2),
    "zero2": ("zero2", {}, 2),
    "zero3": ("zero3", {}, 2),
    "zero2_offload": ("zero2", {"parallel.ds_config": str(shipped_file("zero2_offload"))}, 2),
    "zero3_offload": ("zero3", {"parallel.ds_config": str(shipped_file("zero3_offload"))}, 2),
}
READERS = [
    (name, world_size)
    for name in ENGINES
    for world_size in (1, 2, 3, 4)
    if name != "hsdp" or world_size == 4  # copies of shards of two
    if "offload" not in name or world_size == 3
]
FAST = {"ddp": 3, "fsdp2": 3, "hsdp": 4, "zero1": 1, "zero3": 3}
"""Reader -> its world size in the fast suite: 3 divides no parameter evenly. ZeRO-0 loads as DDP does,
ZeRO-2 as ZeRO-1; offloaded states are cut as those that are not."""
READ_BY_ALL = ("ddp", "fsdp2", "zero1", "zero3")
"""Written by engines that cut differently; the other checkpoints are read by DDP alone in the fast suite."""


@pytest.fixture(scope="module")
def written(tiny_models, small_corpus, tmp_path_factory) -> dict[str, Path]:
    """Run folders that did not stop, by engine."""
    runs = {}
    for name, (strategy, extra, world_size) in ENGINES.items():
        runs[name] = tmp_path_factory.mktemp(name)
        done = forked.train(
            "prior",
            *(f"{key}={value}" for key, value in {**SETTINGS, **extra}.items()),
            models=tiny_models,
            corpus=small_corpus,
            run_dir=runs[name],
            world_size=world_size,
            strategy=strategy,
        )
        assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize(
    ("engine", "world_size"), cases(READERS, lambda reader: FAST.get(reader[0]) == reader[1])
)
def test_every_engine_goes_on_from_every_other(
    engine, world_size, written, tiny_models, small_corpus, tmp_path, request
):
    is_campaign = request.node.get_closest_marker("campaign") is not None
    read = list(ENGINES) if is_campaign or engine == "ddp" else sorted({engine, *READ_BY_ALL})
    strategy, extra, writing_world_size = ENGINES[engine]
    settings = {
        **DEFAULTS,
        **STAGE_DEFAULTS["prior"],
        **SETTINGS,
        **extra,
        "model.prior": str(tiny_models / "prior"),
        "data.shards": str(small_corpus / "train"),
        "run.dir": str(tmp_path / "run"),
        "parallel.strategy": strategy,
    }
    checkpoints = {name: written[name] / "checkpoints" / f"step_{SAVED_AT:08d}" for name in read}
    done = forked.call(
        go_on_from, "prior", settings, checkpoints, NUM_STEPS - SAVED_AT, tmp_path,
        world_size=world_size, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    largest = 0.0
    for name, folder in checkpoints.items():
        assert_same_bits(CheckpointReader(folder), CheckpointReader(tmp_path / name))
        found = json.loads((tmp_path / name / "losses.json").read_text())
        expected = losses(written[name])[SAVED_AT:]
        if (engine, world_size) == (name, writing_world_size):
            assert found == expected
        largest = max(largest, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
    print(f"{engine} on {world_size}: largest difference of a loss {largest:.1e}")
    assert largest <= 1e-5


def assert_same_bits(saved: CheckpointReader, held: CheckpointReader) -> None:
    assert saved.numels == held.numels
    for name, numel in saved.numels.items():
        for kind in FRAGMENT_KINDS:
            assert torch.equal(saved.read(name, kind, 0, numel), held.read(name, kind, 0, numel)), (
                name,
                kind,
            )
