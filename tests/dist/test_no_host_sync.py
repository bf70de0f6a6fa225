"""The host does not read a device value inside a step: it would wait for the device to get there."""

import json
from collections import Counter
from itertools import product

import pytest
import torch
from dist.programs import read_by_the_host
from helpers import forked
from helpers.campaign import cases
from helpers.command import DEFAULTS, STAGE_DEFAULTS

pytestmark = pytest.mark.dist

NUM_STEPS = 3


def readers(stage, strategy, tiny_models, small_corpus, tmp_path, world_size=2, precision="auto"):
    """Lines of code that read values in the step, with how often, on the first rank."""
    settings = {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "data.num_workers": 0,
        "run.dir": str(tmp_path / "run"),
        "parallel.strategy": strategy,
        "parallel.precision": precision,
    }
    done = forked.call(read_by_the_host, stage, settings, NUM_STEPS, tmp_path, world_size=world_size)
    assert done.returncode == 0, done.stderr
    return Counter(json.loads((tmp_path / "rank_0.json").read_text()))


@pytest.mark.parametrize(
    ("stage", "strategy"),
    cases(
        product(("prior", "decoder"), ("ddp", "fsdp2", "zero0")), lambda case: case != ("decoder", "zero0")
    ),
)
def test_nothing_is_read_in_a_step(stage, strategy, tiny_models, small_corpus, tmp_path):
    assert not readers(stage, strategy, tiny_models, small_corpus, tmp_path)


@pytest.mark.parametrize("strategy", cases(["ddp", "fsdp2", "zero0"], "fsdp2".__eq__))
def test_the_loss_scale_is_not_read_either(strategy, tiny_models, small_corpus, tmp_path):
    assert not readers("prior", strategy, tiny_models, small_corpus, tmp_path, precision="fp16")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_alone_reads(strategy, tiny_models, small_corpus, tmp_path):
    """Its optimizers look at the norm on the host to decide whether a step is skipped."""
    found = readers("prior", strategy, tiny_models, small_corpus, tmp_path)
    assert found, "DeepSpeed has stopped reading: say so in the docs, and expect none"
    assert all("/deepspeed/" in line for line in found), found
    print(strategy, sum(found.values()) / NUM_STEPS, "values a step", dict(found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_cuda_never_waits_in_a_step(strategy, precision, tiny_models, small_corpus, tmp_path, monkeypatch):
    """torch itself raises where the host would wait for the GPU."""
    monkeypatch.setitem(forked.ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "0")
    places = (tiny_models, small_corpus, tmp_path)
    assert not readers("prior", strategy, *places, world_size=1, precision=precision)
