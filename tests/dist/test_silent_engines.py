"""What DeepSpeed sums and gathers between ranks stays as it is where its collectives are silent."""

from typing import Any

import pytest
import torch
from helpers.forked import run_on_ranks

from kandinsky_dist.bench.silence import silent
from kandinsky_dist.runtime.process import joined

pytestmark = pytest.mark.dist


def exchange() -> dict[str, Any]:
    """A sum and a gather of ones, silent and then not."""
    import deepspeed.comm as comm

    found: dict[str, Any] = {}
    with joined():
        comm.init_distributed("gloo", verbose=False)

        def values() -> list[list[float]]:
            summed, gathered = torch.ones(2), torch.zeros(4)
            comm.all_reduce(summed)
            comm.all_gather_into_tensor(gathered, torch.ones(2))
            return [summed.tolist(), gathered.tolist()]

        with silent():
            found["silent"] = values()
        found["heard"] = values()
    return found


def test_deepspeed_is_silenced_and_heard_again():
    for rank in run_on_ranks(exchange, 2):
        assert rank["silent"] == [[1.0, 1.0], [0.0] * 4]
        assert rank["heard"] == [[2.0, 2.0], [1.0] * 4]
