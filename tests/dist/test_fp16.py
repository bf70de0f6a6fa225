"""fp16: a step whose gradients leave its range is skipped whole, and the loss scale finds its place.

DeepSpeed takes fp16 on few CPUs; where a test of its stages says so, its answer is replaced, and the rest is
real: its scaler, its masters, its skipped steps.
"""

import json
from pathlib import Path

import pytest
from dist.hostile import Run, all_runs, all_runs_in_fp16, command_where_fp16_is_refused, content
from helpers import forked
from helpers.command import DEFAULTS, metrics, train_arguments
from helpers.forked import run_on_ranks

from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.parallel.loss_scale import INITIAL, SCALE

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
LOADING_DIFFERENTLY = ("ddp", "fsdp2", "zero2", "zero3")
FAST = ("ddp", "zero1", "zero3")
BATCH, NUM_STEPS = 4, 6


@pytest.fixture
def settings(tiny_models, small_corpus):
    def of(run_dir: Path, **others):
        return {
            **DEFAULTS,
            "model.prior": str(tiny_models / "prior"),
            "data.shards": str(small_corpus / "train"),
            "data.global_batch_size": BATCH,
            "data.micro_batch_size": 1,
            "telemetry.report_to": [],
            "parallel.precision": "fp16",
            "run.max_steps": NUM_STEPS,
            "run.dir": str(run_dir),
            **{key.replace("__", "."): value for key, value in others.items()},
        }

    return of


def overflowing(first: int, last: int, factor: float = 1e25) -> dict[int, float]:
    """A factor for the losses of the second rank's samples in some batches, from 1; they stay finite."""
    return {position: factor for position in range((first - 1) * BATCH, last * BATCH) if position % 2}


def scales(run_dir: Path) -> dict[int, float]:
    """Step -> the loss scale after it."""
    return {entry["step"]: entry[SCALE] for entry in metrics(run_dir) if SCALE in entry}


def saved(run_dir: Path) -> Path:
    folder = newest_whole(run_dir / "checkpoints").folder
    assert folder is not None
    return folder


@pytest.mark.parametrize(
    "strategies", [FAST, pytest.param(STRATEGIES, marks=pytest.mark.campaign)], ids=["some", "all"]
)
def test_an_overflow_on_one_rank_is_skipped_by_all_and_halves_the_scale_under_any_strategy(
    strategies, settings, tmp_path
):
    """And a run that stopped in between is, in weights and scale, the one that did not."""
    factors = overflowing(3, 3)
    runs = [Run(settings(tmp_path / "fp32", parallel__precision="fp32"))]
    for strategy in strategies:
        whole, parts = (settings(tmp_path / name) for name in (strategy, f"{strategy}-parts"))
        for one in (whole, parts):
            one["parallel.strategy"] = strategy
        runs.append(Run(whole, factors, observed_step=3))
        if strategy in LOADING_DIFFERENTLY:
            runs += [Run({**parts, "run.max_steps": 4}, factors), Run(parts, factors)]
    for found in run_on_ranks(all_runs_in_fp16, 2, runs):
        assert [item["error"] for item in found] == [None] * len(runs)
        observed = [item["changed"] for item, run in zip(found, runs, strict=True) if run.observed_step]
        assert observed == [0] * len(strategies)
    exact = [entry["loss"] for entry in metrics(tmp_path / "fp32")]
    assert scales(tmp_path / "fp32") == {}
    for strategy in strategies:
        entries = metrics(tmp_path / strategy)
        assert [entry["skipped"] for entry in entries] == [0, 0, 1, 0, 0, 0]
        assert list(scales(tmp_path / strategy).values()) == [INITIAL] * 2 + [INITIAL / 2] * 4
        if strategy in LOADING_DIFFERENTLY:
            assert scales(tmp_path / f"{strategy}-parts") == scales(tmp_path / strategy)
            assert content(saved(tmp_path / strategy)) == content(saved(tmp_path / f"{strategy}-parts"))
        # fp16 keeps 11 bits, so a product is off by up to 2**-11; the encoders run in it too.
        losses = [entry["loss"] for entry in entries[:2]]
        assert losses == pytest.approx(exact[:2], rel=5e-3)
        assert losses != exact[:2], "it did not run in fp16"


def test_the_scale_moves_with_the_checkpoint_to_any_strategy(settings, tmp_path):
    here = settings(tmp_path / "run", data__micro_batch_size=2)
    order = ("ddp", "zero2", "fsdp2", "zero3", "zero0", "zero1", "ddp")
    runs = [
        Run({**here, "parallel.strategy": strategy, "run.max_steps": number}, overflowing(1, 1))
        for number, strategy in enumerate(order, start=1)
    ]
    bf16 = {**here, "parallel.precision": "bf16", "run.max_steps": 8}
    for found in run_on_ranks(all_runs_in_fp16, 2, [*runs, Run(bf16), Run({**here, "run.max_steps": 9})]):
        assert {item["error"] for item in found} == {None}
    assert scales(tmp_path / "run") == {**dict.fromkeys(range(1, 8), INITIAL / 2), 9: INITIAL}
    engine = json.loads((saved(tmp_path / "run") / "state.json").read_text())["run"]["engine"]
    assert engine == {"loss_scale": INITIAL, "loss_scale_good_steps": 1}


def test_looking_for_the_scale_is_no_divergence_but_what_no_scale_helps_is(settings, tmp_path):
    """At the least scale, 1, the guard counts what is skipped, and DeepSpeed does not end the run itself."""
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 1}}))
    common = {"guard__max_rollbacks": 0, "guard__max_nonfinite_steps": 3, "data__micro_batch_size": 2}
    zero2 = {**common, "parallel__strategy": "zero2", "parallel__ds_config": str(file)}
    runs = [
        Run(settings(tmp_path / "found", **common), overflowing(2, 5)),
        Run(settings(tmp_path / "nan", **common), overflowing(2, 5, float("nan"))),
        Run(settings(tmp_path / "least", **zero2), overflowing(2, 6)),
    ]
    for found in run_on_ranks(all_runs_in_fp16, 2, runs):
        fine, *diverged = (item["error"] for item in found)
        assert fine is None
        for error in diverged:
            assert error.startswith("DivergedError: diverged since step 2: 3 non-finite steps in a row")
    assert scales(tmp_path / "found")[NUM_STEPS] == INITIAL / 16
    assert metrics(tmp_path / "nan")[-1]["step"] == 4, "a loss that is no number was counted at once"
    assert scales(tmp_path / "least") == {1: 2.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_on_a_cpu_is_refused_before_anything_is_written(
    strategy, tiny_models, small_corpus, tmp_path
):
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path / "run"}
    words = train_arguments("prior", "parallel.precision=fp16", **places, strategy=strategy)
    done = forked.call(command_where_fp16_is_refused, words)
    assert done.returncode == 78, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "fp16" in line]
    assert f"fp16 is not supported by DeepSpeed on this cpu, which parallel.strategy={strategy} needs" in line
    assert not (tmp_path / "run").exists()


def test_compressed_gradients_overflow_too(settings, tmp_path):
    """Scaled gradients are finite in fp32, and not in the fp16 that they are summed in: a lower one helps."""
    here = settings(tmp_path / "run", parallel__gradient_compression="fp16", optim__max_grad_norm=0.0)
    for found in run_on_ranks(all_runs, 2, [Run(here, overflowing(2, 2, 1e3))]):
        assert found[0]["error"] is None
    assert [entry["skipped"] for entry in metrics(tmp_path / "run")] == [0, 1, 0, 0, 0, 0]
    assert scales(tmp_path / "run")[NUM_STEPS] == INITIAL / 2
