"""float8 on a GPU that has it: the same training, a little coarser, and a checkpoint like any other."""

import pytest
import torch
from helpers import forked
from helpers.command import losses

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.models.float8 import LEAST_CAPABILITY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY,
        reason="needs a GPU of compute capability 8.9 or more",
    ),
]


def numels(run_dir):
    folder = newest_whole(run_dir / "checkpoints").folder
    assert folder is not None
    return CheckpointReader(folder).numels


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_losses_follow_bf16_and_checkpoints_are_the_same(
    strategy, tiny_models, small_corpus, tmp_path, monkeypatch
):
    pytest.importorskip("torchao", reason="needs pip install 'kandinsky-dist[float8]'")
    monkeypatch.setitem(forked.ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "0")
    for name in ("false", "true"):
        settings = ("parallel.precision=bf16", f"parallel.float8={name}", "run.max_steps=4")
        places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path / name}
        done = forked.train("prior", *settings, **places, strategy=strategy)
        assert done.returncode == 0, done.stderr
    # float8 (e4m3) keeps 4 bits, so a product is off by up to 2**-4, and their sum by much less.
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=6e-2)
    assert losses(tmp_path / "true") != losses(tmp_path / "false"), "it did not run in float8"
    assert numels(tmp_path / "true") == numels(tmp_path / "false")
