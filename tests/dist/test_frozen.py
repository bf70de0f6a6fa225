"""Frozen means absent: whole encoders on every rank under ZeRO-3, and nothing of them anywhere else."""

import pytest
import torch
from dist.programs import frozen_facts, saved_names
from helpers.command import DEFAULTS, STAGE_DEFAULTS
from helpers.forked import run_on_ranks

from kandinsky_dist.models.frozen import load_image_encoder, load_movq, load_text_encoder
from kandinsky_dist.models.load import ModelSource

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("stage", "component"), [("prior", "prior"), ("decoder", "unet")])
def test_zero3_leaves_the_frozen_encoders_whole(stage, component, tiny_models, small_corpus, tmp_path):
    settings = {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "run.dir": str(tmp_path),
        "run.max_steps": 1,
        "parallel.precision": "bf16",
        "parallel.strategy": "zero3",
    }
    found = run_on_ranks(frozen_facts, 2, stage, settings)
    cpu = torch.device("cpu")
    encoders = {"image_encoder": load_image_encoder(tiny_models / "prior", torch.bfloat16, cpu)}
    if stage == "prior":
        encoders["text_encoder"] = load_text_encoder(tiny_models / "prior", torch.bfloat16, cpu)
    else:
        encoders["movq"] = load_movq(tiny_models / "decoder", torch.bfloat16, cpu, encode_only=True)
    expected = {
        encoder: {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        for encoder, module in encoders.items()
    }
    source = ModelSource(tiny_models / stage, component)
    trained = {
        name: tensor.numel() for name, tensor in source.state_dict().items() if not name.startswith("clip_")
    }
    for rank in found:
        assert rank["shapes"] == expected
        assert rank["dtypes"] == ["torch.bfloat16"]
        assert not rank["are_partitioned"]
        assert not rank["require_grad"]
        assert rank["trained_are_partitioned"], "the trained model was not built under zero.Init"
        assert rank["num_optimized"] < 0.6 * sum(trained.values())
    assert sum(rank["num_trained"] for rank in found) == sum(trained.values())
    assert saved_names(tmp_path / "checkpoints" / "step_00000001") == set(trained)
