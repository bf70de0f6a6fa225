"""The half of the U-Net's output that no loss reads, a variance, stays as it was loaded."""

import pytest
import torch
from dist.programs import train_each
from helpers.command import DEFAULTS, STAGE_DEFAULTS
from safetensors.torch import load_file

from kandinsky_dist.bench.ranks import run_on_ranks
from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.checkpoint.manager import newest_whole

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def test_decay_does_not_shrink_them_under_any_strategy(tiny_models, small_corpus, tmp_path, monkeypatch):
    """After 20 steps bit for bit; their gradients are 0, so their moments are too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs = [
        {
            **DEFAULTS,
            **STAGE_DEFAULTS["decoder"],
            "model.prior": str(tiny_models / "prior"),
            "model.decoder": str(tiny_models / "decoder"),
            "data.shards": str(small_corpus / "train"),
            "data.audit": False,
            "data.global_batch_size": 2,
            "data.micro_batch_size": 1,
            "optim.weight_decay": 0.1,
            "telemetry.report_to": [],
            "telemetry.log_every_steps": 20,
            "run.max_steps": 20,
            "run.dir": str(tmp_path / strategy),
            "parallel.strategy": strategy,
        }
        for strategy in STRATEGIES
    ]
    run_on_ranks(train_each, 2, "decoder", runs)
    (file,) = (tiny_models / "decoder" / "unet").glob("*.safetensors")
    loaded = load_file(file)
    for strategy in STRATEGIES:
        folder = newest_whole(tmp_path / strategy / "checkpoints").folder
        assert folder is not None
        reader = CheckpointReader(folder)
        for name in ("conv_out.weight", "conv_out.bias"):
            before = loaded[name].flatten()
            middle, end = before.numel() // 2, before.numel()
            assert torch.equal(reader.read(name, "master", middle, end), before[middle:]), (strategy, name)
            for kind in ("exp_avg", "exp_avg_sq"):
                assert not reader.read(name, kind, middle, end).any(), (strategy, name, kind)
            assert not torch.equal(reader.read(name, "master", 0, middle), before[:middle]), (strategy, name)
