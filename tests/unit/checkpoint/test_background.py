"""Copies that training cannot change, and a thread that neither loses an error nor keeps a process alive."""

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.checkpoint import snapshot
from kandinsky_dist.checkpoint.background import Background
from kandinsky_dist.checkpoint.layout import RankTensors
from kandinsky_dist.checkpoint.snapshot import Staging


def live(*sizes: int, first: float = 0.0) -> RankTensors:
    return RankTensors(
        {f"w{index}": torch.arange(float(size)) + first for index, size in enumerate(sizes)}, {}
    )


def test_a_copy_is_not_changed_by_what_happens_to_the_original():
    original = live(5, 3)
    taken = Staging().take(original)
    for tensor in original.tensors.values():
        tensor.zero_()
    assert taken.tensors["w0"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert taken.tensors["w1"].tolist() == [0.0, 1.0, 2.0]


def test_memory_is_used_again_as_long_as_the_sizes_stay():
    staging = Staging()
    first = staging.take(live(5, 3)).tensors["w0"].data_ptr()
    second = staging.take(live(5, 3, first=10.0))
    assert second.tensors["w0"].data_ptr() == first
    assert second.tensors["w1"].tolist() == [10.0, 11.0, 12.0]
    assert staging.take(live(6, 3)).tensors["w0"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_low_precision_is_copied_as_fp32():
    taken = Staging().take(RankTensors({"w": torch.ones(3, dtype=torch.bfloat16)}, {}))
    assert taken.tensors["w"].dtype == torch.float32


@given(sizes=st.lists(st.integers(0, 9), max_size=12), block=st.integers(1, 12))
def test_tensors_never_overlap_however_they_fall_into_blocks(sizes, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_BLOCK_VALUES", block)
        original = live(*sizes, first=1.0)
        taken = Staging().take(original)
    for name, tensor in original.tensors.items():
        assert taken.tensors[name].equal(tensor)


def test_an_error_is_kept_until_it_is_asked_for_and_told_at_once():
    told = threading.Event()
    background = Background(told.set)

    def fail() -> None:
        raise OSError("disk full")

    background.start(fail)
    assert told.wait(60)
    assert str(background.wait()) == "disk full"
    assert background.wait() is None
    background.start(lambda: None)
    assert background.wait() is None
    assert not background.is_busy


def test_work_without_an_end_does_not_keep_the_process_alive():
    program = (
        "import threading\n"
        "from kandinsky_dist.checkpoint.background import Background\n"
        "Background(print).start(threading.Event().wait)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
