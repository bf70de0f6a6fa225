"""The step of engines that replicate: clipped like torch's own, and skipped whole where it is not finite."""

import pytest
import torch
from torch import nn

from kandinsky_dist.optim.adamw import ensure_state
from kandinsky_dist.parallel.base import Fragment
from kandinsky_dist.parallel.replicated import guard_and_clip, owned_share


def layer_and_optimizer():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.1, fused=True)
    ensure_state(optimizer, layer.parameters())
    return layer, optimizer


def take_step(layer, optimizer, scale, max_grad_norm=1.0):
    layer(torch.full((2, 5), scale)).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    outcome = guard_and_clip(optimizer, gradients, learning_rate=0.1, max_grad_norm=max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return outcome


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6, 0.0])
def test_clipping_is_that_of_torch(max_grad_norm):
    layer, _ = layer_and_optimizer()
    layer(torch.ones(2, 5)).sum().backward()
    expected = nn.utils.clip_grad_norm_(layer.parameters(), max_grad_norm or float("inf"))
    clipped = [parameter.grad.clone() for parameter in layer.parameters()]
    other, optimizer = layer_and_optimizer()
    other(torch.ones(2, 5)).sum().backward()
    gradients = [parameter.grad for parameter in other.parameters()]
    outcome = guard_and_clip(optimizer, gradients, learning_rate=0.1, max_grad_norm=max_grad_norm)
    optimizer.step()
    torch.testing.assert_close(outcome.grad_norm, expected)
    for mine, theirs in zip(gradients, clipped, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(bad):
    layer, optimizer = layer_and_optimizer()
    assert take_step(layer, optimizer, 1.0).skipped.item() == 0
    tensors = [
        *layer.parameters(),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    assert take_step(layer, optimizer, bad).skipped.item() == 1
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))
    assert take_step(layer, optimizer, 1.0).skipped.item() == 0
    assert not any(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_of_all_ranks_are_every_value_once(world_size):
    values = torch.arange(5.0)
    held = [Fragment("w", 0, 5, values, values, values)]
    found = [
        item for rank in range(world_size) for item in owned_share(held, rank=rank, world_size=world_size)
    ]
    assert torch.equal(torch.cat([item.master for item in found]), values)
    assert [item.start for item in found] == [int(item.master[0]) for item in found]
