"""The loss scale moves as torch's own does, and not below 1."""

import pytest
import torch
from torch import nn

from kandinsky_dist.optim.adamw import ensure_state
from kandinsky_dist.parallel.loss_scale import INITIAL, NUM_GOOD_STEPS, SCALE, LossScale
from kandinsky_dist.parallel.replicated import guard_and_clip

CPU = torch.device("cpu")
YES, NO = torch.ones(()), torch.zeros(())


def test_it_is_torchs_scaler():
    """Against `torch.amp.GradScaler` over a sequence with overflows, growth and overflows again."""
    mine, theirs = LossScale(CPU, growth_steps=3), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflowed in (0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1):
        (theirs.scale(weight.sum()) * (float("inf") if overflowed else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        mine.update(torch.tensor(float(overflowed)))
        assert mine.value.item() == theirs.get_scale()
    assert mine.value.item() == INITIAL / 8


def test_it_does_not_fall_below_1_and_says_when_it_could_not_be_lowered():
    scale = LossScale(CPU)
    lowered = [scale.update(YES).item() for _ in range(18)]
    assert lowered == [1.0] * 16 + [0.0] * 2
    assert scale.value.item() == 1.0
    assert scale.update(NO).item() == 0.0


def test_a_restored_scale_goes_on_where_it_was():
    scale, other = LossScale(CPU, growth_steps=3), LossScale(CPU, growth_steps=3)
    for overflowed in (YES, NO, NO):
        scale.update(overflowed)
    other.load(scale.state())
    other.update(NO)
    assert other.state() == {SCALE: INITIAL, NUM_GOOD_STEPS: 0}
    other.load({})
    assert other.state() == LossScale(CPU).state()


def test_good_steps_of_an_engine_that_counts_on_are_taken_as_those_since_the_last_growth():
    scale = LossScale(CPU, growth_steps=3)
    scale.load({SCALE: 8.0, NUM_GOOD_STEPS: 5})
    scale.update(NO)
    assert scale.value.item() == 16.0


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6, 0.0])
def test_a_scaled_step_is_the_plain_step_bit_for_bit(max_grad_norm):
    """In fp32, where a power of two changes exponents only."""
    results = []
    for scale in (None, LossScale(CPU)):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, fused=True)
        ensure_state(optimizer, layer.parameters())
        loss = layer(torch.ones(2, 5)).square().sum()
        (loss * scale.value if scale else loss).backward()
        gradients = [item.grad for item in layer.parameters()]
        arguments = {"learning_rate": 0.1, "max_grad_norm": max_grad_norm, "loss_scale": scale}
        outcome = guard_and_clip(optimizer, gradients, **arguments)
        optimizer.step()
        results.append((outcome.grad_norm, outcome.skipped, outcome.rescaled, *layer.parameters()))
    assert all(torch.equal(plain, scaled) for plain, scaled in zip(*results, strict=True))
