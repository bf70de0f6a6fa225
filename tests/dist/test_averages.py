"""Averages under every strategy are those of one process, bit for bit: over skipped steps and resizes too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dist.ema_programs import evaluated, gather, recorded
from helpers import forked
from helpers.campaign import cases
from helpers.command import DEFAULTS, losses, metrics
from safetensors.torch import load_file

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.cli import main
from kandinsky_dist.models.lora import WEIGHT_NAME

pytestmark = pytest.mark.dist

DECAYS = (0.99, 0.15)  # the second is not above the first steps' warm-up for long
SAVED_AT, NUM_STEPS, BAD_STEP = 4, 6, 3
SETTINGS = {
    **DEFAULTS,
    "run.max_steps": NUM_STEPS,
    "checkpoint.every_steps": SAVED_AT,
    "data.global_batch_size": 12,
    "optim.ema_decay": DECAYS,
    "validation.every_steps": 2,
    "validation.num_samples": 12,
}
# Name -> strategy, its settings, world size.
ENGINES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddp": ("ddp", {}, 2),
    "fsdp2": ("fsdp2", {}, 3),
    "hsdp": ("fsdp2", {"parallel.shard_size": 2}, 4),
    "zero0": ("zero0", {}, 2),
    "zero1": ("zero1", {}, 2),
    "zero2": ("zero2", {}, 2),
    "zero3": ("zero3", {}, 2),
    "zero2 in bf16": ("zero2", {"parallel.precision": "bf16"}, 2),
    "lora": ("zero2", {"model.variant": "lora"}, 2),
}
FAST = ("ddp", "hsdp", "zero2 in bf16", "zero3", "lora")
"""FSDP2 is within HSDP, ZeRO-0 cuts as DDP does, ZeRO-1 as ZeRO-2."""


@dataclass(frozen=True)
class Recorded:
    """A run folder, and beside it what its ranks wrote down."""

    run_dir: Path
    folder: Path
    stderr: str

    def facts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("facts_*.json"))]

    def checkpoint(self, step: int) -> CheckpointReader:
        return CheckpointReader(self.run_dir / "checkpoints" / f"step_{step:08d}")

    def written_down(self, name: str) -> CheckpointReader:
        return CheckpointReader(self.folder / name)


@pytest.fixture(scope="module")
def settings(tiny_models, small_corpus) -> dict[str, Any]:
    return {
        **SETTINGS,
        "model.prior": str(tiny_models / "prior"),
        "data.shards": str(small_corpus / "train"),
        "validation.shards": str(small_corpus / "validation"),
    }


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """run(strategy, world size, its settings) -> what was recorded, of a new run."""

    def record(strategy: str, world_size: int, *, bad_step: int = BAD_STEP, **changed: Any) -> Recorded:
        folder = tmp_path_factory.mktemp(strategy)
        asked = {
            **settings,
            "parallel.strategy": strategy,
            "run.dir": str(folder / "run"),
            "data.micro_batch_size": SETTINGS["data.global_batch_size"] // (2 * world_size),
            **changed,
        }
        done = forked.call(recorded, "prior", asked, bad_step, folder, world_size=world_size, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return Recorded(folder / "run", folder, done.stderr)

    return record


@pytest.fixture(scope="module")
def by_engine(run):
    made: dict[str, Recorded] = {}

    def make(engine: str) -> Recorded:
        if engine not in made:
            strategy, extra, world_size = ENGINES[engine]
            made[engine] = run(strategy, world_size, **extra)
        return made[engine]

    return make


def values(reader: CheckpointReader, kind: str) -> dict[str, np.ndarray]:
    """Whole parameters, flat."""
    return {name: reader.read(name, kind, 0, numel).numpy() for name, numel in reader.numels.items()}


def reference(
    start: dict[str, np.ndarray], decay: float, found: Recorded, steps: range, num_updates: int = 0
) -> dict[str, np.ndarray]:
    """The average in a plain loop over whole parameters, of the weights that were written down."""
    average = {name: value.copy() for name, value in start.items()}
    for step in steps:
        if step == BAD_STEP:
            continue
        warm_up = (1 + num_updates) / (10 + num_updates) if num_updates else 0.0
        weight = np.float32(1.0 - min(decay, warm_up))
        for name, value in values(found.written_down(f"after_{step}"), "master").items():
            average[name] = average[name] - weight * (average[name] - value)
        num_updates += 1
    return average


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert sum(value.size for value in one.values()) > 0
    for name, value in one.items():
        assert value.dtype == other[name].dtype == np.float32
        assert np.array_equal(value.view(np.int32), other[name].view(np.int32)), name


@pytest.mark.parametrize("engine", cases(ENGINES, FAST.__contains__))
def test_averages_are_those_of_a_plain_loop_with_a_skipped_step(engine, by_engine):
    found = by_engine(engine)
    for facts in found.facts():
        assert facts["skipped"] == [float(step == BAD_STEP) for step in range(1, NUM_STEPS + 1)]
    start = values(found.written_down("start"), "master")
    trained = values(found.written_down(f"after_{NUM_STEPS}"), "master")
    for decay in DECAYS:
        assert_same_bits(values(found.written_down("start"), f"ema_{decay}"), start)
        for step in (SAVED_AT, NUM_STEPS):
            saved = found.checkpoint(step)
            average = reference(start, decay, found, range(1, step + 1))
            assert_same_bits(values(saved, f"ema_{decay}"), average)
            assert saved.state.run.num_averaged == {f"ema_{decay}": step - 1 for decay in DECAYS}
        assert any(not np.array_equal(average[name], trained[name]) for name in trained)
    before, after = (
        values(found.written_down(f"after_{step}"), "master") for step in (BAD_STEP - 1, BAD_STEP)
    )
    assert_same_bits(before, after)


@pytest.mark.parametrize("engine", cases(ENGINES, FAST.__contains__))
def test_validation_of_an_average_changes_nothing(engine, by_engine):
    """On any rank: neither the weights that forward reads, nor what is trained afterwards."""
    found = by_engine(engine)
    for facts in found.facts():
        assert facts["is_untouched"]
        assert facts["num_compared"] > 0
        first, with_average, last = facts["figures"]
        assert first == last
        assert {**first, **{f"{name}_ema": with_average[f"{name}_ema"] for name in first}} == with_average
        assert facts["figures"] == found.facts()[0]["figures"]
    assert losses(found.run_dir) == losses(found.folder / "plain")
    validated = [entry for entry in metrics(found.run_dir) if "validation_loss" in entry]
    assert [entry["step"] for entry in validated] == [2, 4, 6]
    assert all("validation_loss_ema" in entry for entry in validated)


@pytest.fixture(scope="module")
def evaluated_export(by_engine, settings, tmp_path_factory):
    """evaluated_export(engine) -> the held-out loss, on one process, of what is exported from its average."""
    made: dict[str, float] = {}

    def evaluate(engine: str) -> float:
        if engine not in made:
            folder = tmp_path_factory.mktemp("evaluated")
            assert main(["export", str(by_engine(engine).run_dir), str(folder / "pipeline")]) == 0
            strategy, extra, _ = ENGINES[engine]
            changed = {"model.prior": str(folder / "pipeline"), "run.dir": str(folder / "run"), **extra}
            asked = {**settings, "parallel.strategy": strategy, **changed}
            done = forked.call(evaluated, "prior", asked, folder / "figures.json")
            assert done.returncode == 0, done.stderr[-3000:]
            made[engine] = json.loads((folder / "figures.json").read_text())["validation_loss"]
        return made[engine]

    return evaluate


@pytest.mark.parametrize("engine", cases([name for name in ENGINES if name != "lora"], FAST.__contains__))
def test_every_rank_validates_the_whole_average(engine, by_engine, evaluated_export):
    # In fp32 all engines have the same average but for rounding, so one of them is exported for all.
    expected = evaluated_export(engine if "bf16" in engine else "ddp")
    last = metrics(by_engine(engine).run_dir)[-1]
    assert last["validation_loss_ema"] == pytest.approx(expected, rel=1e-4 if "bf16" in engine else 1e-5)
    assert abs(last["validation_loss"] - expected) > 1e-3 * expected, "it compares nothing"


def test_an_average_outlives_another_strategy_at_another_world_size(by_engine, run):
    """And others may be asked for: a new one starts from the restored weights, one not listed is dropped."""
    ddp, new = by_engine("ddp"), 0.5
    kept, dropped = DECAYS
    saved = ddp.checkpoint(SAVED_AT)
    moved = run(
        "zero2", 3, bad_step=0, **{"run.resume": str(saved.folder), "optim.ema_decay": (new, kept)}
    )  # fmt: skip
    start = moved.written_down("start")
    assert_same_bits(values(start, f"ema_{kept}"), values(saved, f"ema_{kept}"))
    assert_same_bits(values(start, f"ema_{new}"), values(saved, "master"))
    rest, last = range(SAVED_AT + 1, NUM_STEPS + 1), moved.checkpoint(NUM_STEPS)
    expected = reference(values(start, f"ema_{kept}"), kept, moved, rest, num_updates=SAVED_AT - 1)
    assert_same_bits(values(last, f"ema_{kept}"), expected)
    assert_same_bits(values(last, f"ema_{new}"), reference(values(saved, "master"), new, moved, rest))
    assert last.state.run.num_averaged == {f"ema_{new}": 2, f"ema_{kept}": NUM_STEPS - 1}
    assert f"ema_{dropped}" not in last.kinds
    said = moved.stderr.splitlines()
    new_line = f"optim.ema_decay={new} is new: its average starts from the weights of step {SAVED_AT}"
    assert said.count(f"kandinsky-dist: {new_line}") == 1
    assert (
        said.count(
            f"kandinsky-dist: the average with decay {dropped} is dropped: optim.ema_decay does not list it"
        )
        == 2
    ), "once by the run, once by the one without averages before it"


@pytest.mark.parametrize("engine", ["zero3", "lora"])
def test_export_takes_what_it_says(engine, by_engine, tmp_path, capsys):
    found = by_engine(engine)
    checkpoint = found.checkpoint(NUM_STEPS)
    largest, other = DECAYS
    for number, (words, kind, said) in enumerate(
        (
            ([], f"ema_{largest}", f"the average with decay {largest}"),
            (["--ema", str(other)], f"ema_{other}", f"the average with decay {other}"),
            (["--ema", "none"], "master", "the weights as trained"),
        )
    ):
        out = tmp_path / str(number)
        assert main(["export", str(found.run_dir), str(out), *words]) == 0
        assert capsys.readouterr().err == f"kandinsky-dist: exported step_{NUM_STEPS:08d}: {said}\n"
        expected = values(checkpoint, kind)
        if engine == "lora":
            exported = load_file(out / WEIGHT_NAME)
            expected = {name.replace(".default.", "."): value for name, value in expected.items()}
            assert exported.keys() == expected.keys()
        else:
            exported = load_file(out / "prior" / "diffusion_pytorch_model.safetensors")
        assert_same_bits(expected, {name: exported[name].flatten().numpy() for name in expected})
    averages = f"{checkpoint.folder} has averages with decay {other}, {largest}: name one, or none for the "
    for word in ("0.5", "fast"):
        assert main(["export", str(found.run_dir), str(tmp_path / "out"), "--ema", word]) == 78
        assert capsys.readouterr().err == f"--ema={word}: {averages}weights as trained\n"
    plain = found.folder / "plain"
    assert main(["export", str(plain), str(tmp_path / "out"), "--ema", "0.5"]) == 78
    assert capsys.readouterr().err.endswith("has no average of the weights: leave --ema out\n")
    assert main(["export", str(plain), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.endswith("the weights as trained, for it has no average of them\n")


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_of_any_length_reach_all_ranks_in_buckets_of_any_size(world_size):
    lengths, buckets_bytes = [1, 7, 0, 2, 3, 64, 5], [1, 12, 36, 120, 2**20]
    assert forked.call(gather, lengths, buckets_bytes, world_size=world_size).returncode == 0
    assert torch.float32.itemsize == 4, "bytes above are those of fp32"
