"""What a run that ran out of memory is told to change."""

import numpy as np
import pytest
import torch

from kandinsky_dist.config import loader
from kandinsky_dist.errors import explained
from kandinsky_dist.train.out_of_memory import remedy


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"data.micro_batch_size": 8},
            "data.micro_batch_size=4 (the global batch stays 64), parallel.gradient_checkpointing=true, "
            "parallel.strategy=fsdp2 or zero2, more GPUs",
        ),
        (
            {
                "data.micro_batch_size": 9,
                "parallel.gradient_checkpointing": True,
                "parallel.strategy": "zero1",
            },
            "data.micro_batch_size=3 (the global batch stays 64), parallel.strategy=zero2 or zero3, "
            "more GPUs",
        ),
        (
            {
                "data.micro_batch_size": 1,
                "parallel.gradient_checkpointing": True,
                "parallel.strategy": "zero3",
            },
            "more GPUs",
        ),
    ],
)
def test_the_cheapest_comes_first_and_what_is_done_already_is_left_out(settings, expected):
    config = loader.load("prior", None, [loader.Layer("test", settings)]).config
    assert remedy(config) == f"try, in this order: {expected}"


def test_every_kind_of_full_memory_is_one_line():
    """Real errors of Python, of torch on a CPU and of numpy; torch's of a GPU is told by its class."""
    size = 2**62
    for allocate in (lambda: bytearray(size), lambda: torch.empty(size // 8), lambda: np.empty(2**50)):
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            allocate()
        line, code = explained(raised.value)
        assert line.startswith("out of memory: ")
        assert "\n" not in line
        assert code == 1
    line, code = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert (line, code) == ("out of memory: CUDA out of memory. Tried to allocate 2 GiB", 1)
    assert explained(RuntimeError("something else")) is None
