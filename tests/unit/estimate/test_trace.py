"""What is counted on shapes alone is what real tensors take, by two other counts."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from helpers.campaign import cases
from helpers.shapes import config_of, least, write_shapes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from kandinsky_dist.estimate.networks import Networks
from kandinsky_dist.estimate.trace import Living, trace, transient_bytes

NUM_SAMPLES = 3
CASES = [
    ("prior", None, False),
    ("prior", None, True),
    ("prior", torch.bfloat16, False),
    ("prior", torch.bfloat16, True),
    ("decoder", None, False),
    ("decoder", torch.bfloat16, True),
]
IN_CAMPAIGN = [CASES[0], CASES[3]]


class Parts:
    """Networks, and the losses of a micro-batch, of which the slow parts are made once."""

    def __init__(self, folder, stage, mode):
        self.networks, self.mode = Networks.of(config_of(folder, stage)), mode
        with mode():
            self.objective = self.networks.build_objective(torch.float32)
            self.prepared = self.objective.prepare(self.networks.batch(NUM_SAMPLES))

    def build(self, is_recomputed=False):
        return self.networks.with_recomputation(is_recomputed).build()

    def losses(self, model):
        return self.objective.losses(model, self.prepared)

    @cache  # noqa: B019 (lives as long as the module's tests)
    def trace(self, autocast=None, is_recomputed=False):
        with self.mode():
            return trace(self.build(is_recomputed), self.losses, autocast=autocast)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(stage, whether tensors are real) -> its parts."""
    folder = write_shapes(tmp_path_factory.mktemp("shapes"), least())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return cache(lambda stage, is_real: Parts(folder, stage, nullcontext if is_real else lambda: fake))


@pytest.mark.parametrize(
    ("stage", "autocast", "is_recomputed"), cases(CASES, lambda case: case not in IN_CAMPAIGN)
)
def test_shapes_take_what_real_tensors_take(stage, autocast, is_recomputed, parts):
    on_shapes, real = (parts(stage, is_real).trace(autocast, is_recomputed) for is_real in (False, True))
    assert on_shapes == real


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_what_is_kept_is_what_autograd_saves(stage, parts):
    real = parts(stage, True)
    model = real.build()
    there = (*model.parameters(), *model.buffers(), *real.prepared.tensors())
    states = {item.untyped_storage().data_ptr() for item in there}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in states:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = real.losses(model).mean()
    kept = parts(stage, False).trace().kept
    # The count has the loss itself, which nobody saves.
    assert kept == pytest.approx(sum(saved.values()), rel=0.01), (kept, loss)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_peak_is_that_of_torchs_allocator(stage, parts):
    real = parts(stage, True)
    model = real.build()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(profile_memory=True) as profiler:
        real.losses(model).mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    counted = parts(stage, False).trace().peak
    assert counted <= 1.01 * peak, (counted, peak)
    if stage == "prior":  # a CPU's convolutions allocate for themselves, and much beside networks so small
        assert counted >= 0.95 * peak, (counted, peak)


@pytest.mark.parametrize(("stage", "autocast"), [("prior", None), ("decoder", torch.bfloat16)])
def test_recomputation_keeps_less(stage, autocast, parts):
    whole, recomputed = (parts(stage, False).trace(autocast, flag) for flag in (False, True))
    assert recomputed.kept < 0.7 * whole.kept


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
    # The input in bf16, the norm's input in fp32 with two figures a row, its output in bf16; the second
    # weight in bf16, and not the first: its input needs no gradient.
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
