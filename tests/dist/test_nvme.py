"""Weights of ZeRO-3 on a disk are those in memory: the same training, the same checkpoints."""

import json
import os

import pytest
from dist.nvme_programs import compile_reader, why_not, write_and_read_back
from helpers.forked import run_on_ranks

pytestmark = [pytest.mark.dist, pytest.mark.long]

# DeepSpeed compiles its reader at the first use, for minutes.
REASON = why_not() if "KANDINSKY_DIST_CAMPAIGN" in os.environ else "only with KANDINSKY_DIST_CAMPAIGN"
NUM_STEPS = 3


@pytest.mark.skipif(REASON is not None, reason=f"DeepSpeed's reader for disks is not compiled here: {REASON}")
def test_weights_on_nvme_train_save_and_load_as_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    compile_reader()
    files = {}
    for device in ("cpu", "nvme"):
        files[device] = tmp_path / f"{device}.json"
        offload = {"device": device, "pin_memory": False}
        if device == "nvme":
            # Two buffers as large as the largest rank's share of a weight.
            offload |= {"nvme_path": str(tmp_path / "disk"), "buffer_count": 5, "buffer_size": 4_000_000}
        content = {"zero_optimization": {"stage": 3, "offload_param": offload}}
        files[device].write_text(json.dumps(content))
    found = {
        device: run_on_ranks(write_and_read_back, 2, str(file), tmp_path / device, NUM_STEPS)
        for device, file in files.items()
    }
    for ranks in found.values():
        for rank in ranks:
            assert rank["loaded"] == rank["saved"], "a checkpoint did not come back as it was written"
            assert rank["losses"][NUM_STEPS:] == rank["losses again"]
    for on_disk, in_memory in zip(found["nvme"], found["cpu"], strict=True):
        assert on_disk["num_swapped"] > 0, "no weight went to the disk"
        assert in_memory["num_swapped"] == 0
        assert on_disk["losses"] == in_memory["losses"]
        assert on_disk["saved"] == in_memory["saved"]
