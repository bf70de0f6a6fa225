"""Collectives that return at once, and are themselves again afterwards."""

import pytest
import torch
import torch.distributed as dist

from kandinsky_dist.bench.silence import TORCH, silent


def test_nobody_is_asked_inside_and_everybody_is_again_outside():
    before = [getattr(dist, name) for name in TORCH]
    tensor = torch.ones(3)
    with silent():
        # There is no process group: the real ones would say so.
        assert dist.all_reduce(tensor, async_op=True).wait()
        assert dist.all_gather_into_tensor(torch.zeros(6), tensor).is_completed()
    assert [getattr(dist, name) for name in TORCH] == before
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="process group has not been initialized"):
        dist.all_reduce(tensor)
