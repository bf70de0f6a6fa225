"""Parameter groups decay what should decay, and nothing that would only shrink (B14)."""

import torch
from torch import nn

from kandinsky_dist.optim.adamw import ensure_state, is_decayed, parameter_groups, set_step_count


def test_only_matrices_and_kernels_decay():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3))
    decayed = {name for name, parameter in module.named_parameters() if is_decayed(name, parameter)}
    assert decayed == {"0.weight", "2.weight"}
    matrix = torch.ones(2, 2)
    for name in ("clip_mean", "clip_std", "conv_out.weight", "positional_embedding", "prd_embedding"):
        assert not is_decayed(name, matrix), name


def test_groups_hold_every_trained_parameter_once_and_no_frozen_one():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].bias.requires_grad_(False)
    for weight_decay, expected in ((0.0, [[0.0, 3]]), (0.1, [[0.1, 1], [0.0, 2]])):
        groups = parameter_groups(module.named_parameters(), weight_decay)
        assert [[group["weight_decay"], len(group["params"])] for group in groups] == expected


def test_state_made_ahead_is_the_state_that_a_first_step_makes():
    steps = []
    for is_ahead in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        if is_ahead:
            ensure_state(optimizer, layer.parameters())
            set_step_count(optimizer, 0)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        steps.append((layer.weight.detach().clone(), optimizer.state[layer.weight]))
    assert torch.equal(steps[0][0], steps[1][0])
    assert steps[0][1].keys() == steps[1][1].keys()
    assert all(torch.equal(steps[0][1][name], steps[1][1][name]) for name in steps[0][1])


def test_a_step_count_that_is_one_off_changes_the_update():
    """Why ZeRO-0 does not use DeepSpeed's bf16 wrapper, whose first update is 0.744 of the right one."""
    sizes = []
    for num_steps in (0, 1):
        layer = nn.Linear(1, 1, bias=False)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0, fused=True)
        ensure_state(optimizer, layer.parameters())
        set_step_count(optimizer, num_steps)
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        sizes.append((layer.weight.detach() - before).abs().item())
    assert abs(sizes[1] / sizes[0] - 0.744) < 1e-3
