"""What a process settles for its device."""

import os
from pathlib import Path

import pytest
import torch

from kandinsky_dist.runtime.process import device_of


def heap():
    """Its first address, and the one behind its last; the kernel may list it in several pieces."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    pieces = [tuple(int(address, 16) for address in line.split()[0].split("-")) for line in lines]
    return pieces[0][0], pieces[-1][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a GPU leaves the host's memory alone")
@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="another library is not asked")
def test_large_tensors_of_a_cpu_lie_in_the_heap_which_keeps_what_is_freed():
    assert device_of(0) == torch.device("cpu")
    tensor = torch.ones(64 * 2**20)
    begin, end = heap()
    assert begin <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end
    del tensor
    assert heap() == (begin, end)
