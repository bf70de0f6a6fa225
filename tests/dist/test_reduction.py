"""Every way of reducing gradients trains what one process trains, and offloading changes nothing."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.reduction_programs import DEPTH, NUM_STEPS, WIDTH, plain_training, train_all
from helpers import forked

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.parallel.base import FRAGMENT_KINDS
from kandinsky_dist.parallel.ds_config import shipped_file

pytestmark = pytest.mark.dist

LAYER_BYTES = 4 * (WIDTH + 1) * WIDTH
MODEL_BYTES = DEPTH * LAYER_BYTES
BUCKETS_MIB = (0.01, 0.03)  # one layer, three layers
ACCUMULATIONS = (1, 3)

DDP = {
    f"ddp_{bucket}_{static}_{num_micro}": {
        "bucket_mib": bucket,
        "static_graph": static,
        "num_micro": num_micro,
    }
    for bucket, static, num_micro in product(BUCKETS_MIB, (False, True), ACCUMULATIONS)
}
AFTER = {
    f"ddp_after_{static}_{num_micro}": {"overlap": False, "static_graph": static, "num_micro": num_micro}
    for static, num_micro in product((False, True), ACCUMULATIONS)
}
FIRST = {
    f"ddp_first_{static}_{num_micro}": {
        "first_bucket_mib": 0.001, "bucket_mib": 0.03, "static_graph": static, "num_micro": num_micro,
    }
    for static, num_micro in product((False, True), ACCUMULATIONS)
}  # fmt: skip
COMPRESSED = {
    f"ddp_{kind}_{static}": {
        "gradient_compression": kind, "bucket_mib": 0.03, "static_graph": static, "num_micro": 3,
    }
    for kind, static in product(("bf16", "fp16"), (False, True))
}  # fmt: skip
STAGES = ("zero1", "zero2", "zero3")
OFFLOADED = ("zero2", "zero3")


@pytest.fixture(scope="module")
def zero_cases(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Cases of stages 1 to 3; zero3 last, for it replaces torch's linear function for all that follows."""
    folder = tmp_path_factory.mktemp("ds_configs")
    cases: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        files = {"": shipped_file(stage)}
        if stage in OFFLOADED:
            files["_offload"] = shipped_file(f"{stage}_offload")
        for suffix, shipped in files.items():
            settings = json.loads(shipped.read_text())
            if stage == "zero3":  # else weights as small as these are never gathered
                settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            file = folder / f"{stage}{suffix}.json"
            file.write_text(json.dumps(settings))
            for bucket, overlap in product(BUCKETS_MIB, (True, False)):
                cases[f"{stage}{suffix}_{bucket}_{overlap}"] = {
                    "strategy": stage,
                    "ds_config": str(file),
                    "bucket_mib": bucket,
                    "overlap": overlap,
                    "num_micro": 3,
                }
        if stage in OFFLOADED:
            like = cases[f"{stage}_offload_{BUCKETS_MIB[0]}_True"]
            cases[f"{stage}_offload_resumed"] = {**like, "seed": 1, "load_from": "ddp_0.01_False_1_half"}
    return cases


@pytest.fixture(scope="module")
def runs(zero_cases, tmp_path_factory) -> Path:
    """All cases, trained by the same two processes one after another."""
    out = tmp_path_factory.mktemp("reduction")
    cases = {**DDP, **AFTER, **FIRST, **COMPRESSED, **zero_cases}
    cases["ddp_of_offloaded"] = {"load_from": f"zero3_offload_{BUCKETS_MIB[0]}_True", "seed": 1}
    done = forked.call(train_all, cases, out, world_size=2, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and their moving average by a plain loop in one process."""
    return plain_training()


def masters(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name, "master", 0, numel) for name, numel in reader.numels.items()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name].flatten()).abs().max().item() for name in found)


def facts(runs: Path, case: str) -> dict[str, Any]:
    """What both ranks saw; they must agree."""
    first, second = (json.loads((runs / case / f"facts_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


ZERO = [
    *(
        f"{stage}_{bucket}_{overlap}"
        for stage, bucket, overlap in product(STAGES, BUCKETS_MIB, (True, False))
    ),
    *(
        f"{stage}_offload_{bucket}_{overlap}"
        for stage, bucket, overlap in product(OFFLOADED, BUCKETS_MIB, (True, False))
    ),
    *(f"{stage}_offload_resumed" for stage in OFFLOADED),
]


@pytest.mark.parametrize("case", [*DDP, *AFTER, *FIRST, *ZERO])
def test_parameters_are_those_of_one_process(case, runs, reference):
    difference = largest_difference(masters(runs / case), reference[0])
    print(f"{case}: {difference:.1e}")
    assert difference <= 1e-6


@pytest.mark.parametrize("case", [*DDP, *(case for case in ZERO if not case.endswith("resumed"))])
def test_an_average_kept_beside_the_fragments_is_that_of_one_process(case, runs, reference):
    assert largest_difference(masters(runs / f"{case}_average"), reference[1]) <= 1e-6


@pytest.mark.parametrize("case", [*DDP, *AFTER, *FIRST, *COMPRESSED])
def test_gradients_are_reduced_in_the_buckets_that_were_asked_for(case, runs):
    sizes = facts(runs, case)["bucket_bytes"]
    assert sum(sizes) == MODEL_BYTES
    if case in AFTER:
        assert sizes == [MODEL_BYTES]
    elif case in FIRST:
        assert sizes[0] <= LAYER_BYTES < sizes[1]
    else:
        settings = {**DDP, **COMPRESSED}[case]
        # A bucket is closed by the tensor with which it reaches its size.
        assert len(sizes) > 1
        assert all(size >= settings["bucket_mib"] * 2**20 for size in sizes[:-1])
        assert max(sizes) < settings["bucket_mib"] * 2**20 + LAYER_BYTES


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_gradients_are_within_the_bound_of_their_roundings(case, runs):
    seen = facts(runs, case)
    num_tensors = 2 * DEPTH
    assert len(seen["errors"]) == NUM_STEPS * num_tensors
    # A static graph is learnt in the first micro-batch, whose gradients pass through two reductions.
    counted = seen["errors"][num_tensors if COMPRESSED[case]["static_graph"] else 0 :]
    assert max(counted) <= 0, "bound() of the program says what is allowed"
    assert seen["is_rounded"], "they were not compressed"
    assert seen["is_fp32"]


@pytest.mark.parametrize("case", COMPRESSED)
def test_compression_keeps_the_ranks_alike(case, runs, reference):
    assert "sum_bits" in facts(runs, case), "facts() compares what the ranks say"
    assert largest_difference(masters(runs / case), reference[0]) > 0


def test_what_an_offloaded_zero3_wrote_loads_in_ddp_bit_for_bit(runs):
    written, loaded = (
        CheckpointReader(runs / name) for name in (f"zero3_offload_{BUCKETS_MIB[0]}_True", "ddp_of_offloaded")
    )
    assert written.numels == loaded.numels
    for name, numel in written.numels.items():
        for kind in FRAGMENT_KINDS:
            assert torch.equal(written.read(name, kind, 0, numel), loaded.read(name, kind, 0, numel))
