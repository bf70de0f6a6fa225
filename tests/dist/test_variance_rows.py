"""The half of the U-Net's output that no loss reads, a variance, stays as it was loaded."""

from functools import partial

import pytest
import torch
from dist.variance_programs import train_unet
from helpers.forked import run_on_ranks

from kandinsky_dist.bench.workload import build, random_weights
from kandinsky_dist.checkpoint.layout import CheckpointReader

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def test_decay_does_not_shrink_them_under_any_strategy(tmp_path, monkeypatch):
    """After 20 steps bit for bit; their gradients are 0, so their moments are too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    weights = random_weights(partial(build, "decoder", "tiny"))
    run_on_ranks(train_unet, 2, STRATEGIES, weights, 20, tmp_path)
    for strategy in STRATEGIES:
        reader = CheckpointReader(tmp_path / strategy)
        for name in ("conv_out.weight", "conv_out.bias"):
            before = weights[name].flatten()
            middle, end = before.numel() // 2, before.numel()
            assert torch.equal(reader.read(name, "master", middle, end), before[middle:]), (strategy, name)
            for kind in ("exp_avg", "exp_avg_sq"):
                assert not reader.read(name, kind, middle, end).any(), (strategy, name, kind)
            assert not torch.equal(reader.read(name, "master", 0, middle), before[:middle]), (strategy, name)
        decayed = weights["conv_in.weight"].flatten()
        assert not torch.equal(reader.read("conv_in.weight", "master", 0, decayed.numel()), decayed)
