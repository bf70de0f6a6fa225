"""What is counted on shapes alone is what real tensors take, by two other counts."""

import pytest
import torch
from helpers.shapes import config_of, write_shapes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from kandinsky_dist.estimate.networks import Networks
from kandinsky_dist.estimate.trace import Living, trace, transient_bytes

NUM_SAMPLES = 3


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), "tiny")


def made(networks, dtype=torch.float32):
    """Model, and a function of it that gives the losses of a micro-batch."""
    objective = networks.build_objective(torch.float32)
    prepared = objective.prepare(networks.batch(NUM_SAMPLES))
    return networks.build(dtype), lambda model: objective.losses(model, prepared)


def on_shapes(networks, **settings):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, losses = made(networks)
        return trace(model, losses, **settings)


@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_shapes_take_what_real_tensors_take(stage, autocast, is_recomputed, shapes):
    networks = Networks.of(config_of(shapes, stage)).with_recomputation(is_recomputed)
    model, losses = made(networks)
    assert on_shapes(networks, autocast=autocast) == trace(model, losses, autocast=autocast)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_what_is_kept_is_what_autograd_saves(stage, shapes):
    networks = Networks.of(config_of(shapes, stage))
    model, losses = made(networks)
    states = {item.untyped_storage().data_ptr() for item in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in states:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = losses(model).mean()
    kept = on_shapes(networks).kept
    # The hooks see inputs of the micro-batch too; the count has the loss itself, which nobody saves.
    assert kept == pytest.approx(sum(saved.values()), rel=0.01), (kept, loss)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_peak_is_that_of_torchs_allocator(stage, shapes):
    networks = Networks.of(config_of(shapes, stage))
    model, losses = made(networks)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(profile_memory=True) as profiler:
        losses(model).mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    counted = on_shapes(networks).peak
    assert counted <= 1.01 * peak, (counted, peak)
    if stage == "prior":  # a CPU's convolutions allocate for themselves, and much beside networks so small
        assert counted >= 0.95 * peak, (counted, peak)


def test_recomputation_keeps_less(shapes):
    for stage in ("prior", "decoder"):
        networks = Networks.of(config_of(shapes, stage))
        whole, recomputed = (on_shapes(networks.with_recomputation(flag)) for flag in (False, True))
        assert recomputed.kept < 0.7 * whole.kept, stage


def test_norms_are_in_fp32_under_autocast_as_on_a_gpu():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 64, bias=False)
            )

        def forward(self, values):
            return self.layers(values)

    values_ND = torch.randn(1000, 64)
    counted = trace(model := Normed(), lambda model: model(values_ND).float().sum(), autocast=torch.bfloat16)
    size = values_ND.numel()
    # The input in bf16, the norm's input in fp32 with two figures a row, its output in bf16; of the weights
    # in bf16 the second alone: the input of the first needs no gradient.
    expected = 2 * size + 4 * size + 2 * 4 * 1000 + 2 * size + 2 * 64 * 64
    assert counted.kept == pytest.approx(expected, rel=0.01), model


def test_views_and_what_was_there_before_count_nothing_and_the_dead_are_forgotten():
    before = torch.zeros(1000)
    with Living() as living:
        views = [before.view(10, 100), before[:10]]
        assert living.num_bytes == 0
        made = before + 1
        made[:10].add_(1)
        assert living.num_bytes == 4000
        del made
        assert (living.num_bytes, living.peak_bytes) == (0, 4000), views


def test_a_call_without_gradients_takes_its_fullest_moment():
    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return (second + 1)[:1]

    assert transient_bytes(call) == 8000
