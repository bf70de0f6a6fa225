"""A step that is not finite changes nothing; a run that diverges goes back, the same way every time."""

import json
from pathlib import Path

import pytest
from dist.hostile import Run, all_runs, content
from helpers import forked
from helpers.campaign import cases
from helpers.command import DEFAULTS, keys, metrics
from helpers.forked import run_on_ranks

from kandinsky_dist.checkpoint.manager import checkpoints_of, newest_whole
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.tables import Tables
from kandinsky_dist.telemetry.sinks import read_metrics

pytestmark = pytest.mark.dist

LOADING_DIFFERENTLY = ("ddp", "fsdp2", "zero2", "zero3")
STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
BATCH, NUM_STEPS = 4, 12
NAN = float("nan")


@pytest.fixture
def settings(tiny_models, small_corpus):
    """Of a run in a folder: a checkpoint every 2 steps of which 2 stay, a look at the losses every 4."""

    def of(run_dir: Path, **others):
        return {
            **DEFAULTS,
            "model.prior": str(tiny_models / "prior"),
            "data.shards": str(small_corpus / "train"),
            "data.audit": True,
            "data.global_batch_size": BATCH,
            "data.micro_batch_size": 1,
            "data.caption_dropout": 0.5,
            "telemetry.log_every_steps": 4,
            "telemetry.report_to": [],
            "optim.lr_scheduler": "cosine",
            "checkpoint.every_steps": 2,
            "checkpoint.keep": 2,
            "guard.max_nonfinite_steps": 6,
            "run.max_steps": NUM_STEPS,
            "run.dir": str(run_dir),
            **{key.replace("__", "."): value for key, value in others.items()},
        }

    return of


def batches(first: int, last: int, factor: float = NAN, ranks=(0, 1)) -> dict[int, float]:
    """The factor for the samples of some batches, counted from 1, which of 2 ranks get."""
    positions = range((first - 1) * BATCH, last * BATCH)
    return {position: factor for position in positions if position % 2 in ranks}


def expected_keys(shards: Path, numbers: list[int]) -> dict[int, list[str]]:
    """Step -> sorted keys, where step i is made of batch numbers[i - 1], straight from the order's rule."""
    order, found = Order([read_manifest(str(shards))], seed=0), {}
    tables = Tables(order.manifest)
    for step, number in enumerate(numbers, start=1):
        places = order.locate(range((number - 1) * BATCH, number * BATCH)).each()
        found[step] = sorted(
            (table := tables[place.shard]).index.keys_N[table.row(place)] for place in places
        )
    return found


def last_weights(run_dir: Path, step: int = NUM_STEPS) -> dict[str, str]:
    found = newest_whole(run_dir / "checkpoints")
    assert found.folder is not None
    assert found.folder.name == f"step_{step:08d}"
    return content(found.folder)


def rollbacks(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollbacks.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_nonfinite_step_on_one_rank_changes_nothing(strategy, settings, tmp_path):
    """Neither at once nor for what a restart makes of AdamW's step count."""
    common = {"parallel__strategy": strategy, "telemetry__log_every_steps": 1}
    one_step, whole, parts = batches(3, 3, ranks=(1,)), tmp_path / "whole", tmp_path / "parts"
    runs = [
        Run(settings(whole, **common, run__max_steps=5), one_step, observed_step=3),
        Run(settings(parts, **common, run__max_steps=4), one_step),
        Run(settings(parts, **common, run__max_steps=5), one_step),
    ]
    for run in runs:  # the rate does not depend on run.max_steps, which the parts differ in
        run.settings["optim.lr_scheduler"] = "constant"
    for found in run_on_ranks(all_runs, 2, runs):
        assert [item["error"] for item in found] == [None] * len(runs)
        assert found[0]["changed"] == 0
    entries = metrics(whole)
    assert [entry["skipped"] for entry in entries] == [0, 0, 1, 0, 0]
    assert [entry["loss"] > 0 for entry in entries] == [True, True, False, True, True]
    assert last_weights(whole, 5) == last_weights(parts, 5)


@pytest.mark.parametrize("strategy", cases(STRATEGIES, ("ddp", "zero3").__contains__))
def test_a_run_of_nonfinite_steps_is_passed_over(strategy, settings, small_corpus, tmp_path):
    """Against a run that was put behind the stretch by hand, from step 4 and from the initial weights."""
    later, first = batches(6, 11, ranks=(1,)), batches(1, 6, ranks=(0,))
    names = ("guarded", "again", "by-hand", "initial", "initial-by-hand")
    at = {name: tmp_path / name for name in names}
    common = {"parallel__strategy": strategy, "data__num_workers": int(strategy == "ddp")}
    runs = [
        Run(settings(at["guarded"], **common), later),
        Run(settings(at["by-hand"], **common, run__max_steps=4)),
        Run(settings(at["by-hand"], **common), moved_to=12 * BATCH),
    ]
    if strategy in LOADING_DIFFERENTLY:
        runs += [
            Run(settings(at["initial"], **common), first),
            Run(settings(at["initial-by-hand"], **common), moved_to=8 * BATCH),
        ]
    if strategy == "ddp":
        runs.append(Run(settings(at["again"], **common), later))
    for run in runs:  # the rate does not depend on run.max_steps, which the parts differ in
        run.settings["optim.lr_scheduler"] = "constant_with_warmup"
        run.settings["optim.lr_warmup_steps"] = NUM_STEPS
    for found in run_on_ranks(all_runs, 2, runs):
        assert [item["error"] for item in found] == [None] * len(runs)
    if strategy == "ddp":
        assert last_weights(at["guarded"]) == last_weights(at["again"])
    assert last_weights(at["guarded"]) == last_weights(at["by-hand"])
    assert [path.name for path in checkpoints_of(at["guarded"] / "checkpoints")] == [
        "step_00000012",
        "step_00000010",
    ]
    shards = small_corpus / "train"
    assert keys(at["guarded"]) == expected_keys(shards, [*range(1, 5), *range(13, 21)])
    (went_back,) = rollbacks(at["guarded"])
    assert went_back["step"] == 12
    assert went_back["diverged_since_step"] == 6
    assert went_back["reason"] == "6 non-finite steps in a row"
    assert went_back["checkpoint"] == "step_00000004"
    assert (went_back["first_position"], went_back["last_position"]) == (4 * BATCH, 12 * BATCH - 1)
    assert [
        (entry["step"], entry["rollbacks"], entry["samples_consumed"]) for entry in metrics(at["guarded"])
    ] == [(4, 0, 4 * BATCH), (8, 1, 16 * BATCH), (12, 1, 20 * BATCH)]
    if strategy in LOADING_DIFFERENTLY:
        assert last_weights(at["initial"]) == last_weights(at["initial-by-hand"])
        assert keys(at["initial"]) == expected_keys(shards, list(range(9, 21)))
        (went_back,) = rollbacks(at["initial"])
        assert went_back["checkpoint"] == "the initial weights"
        assert (went_back["first_position"], went_back["last_position"]) == (0, 8 * BATCH - 1)


MOMENTS = ("commit before", "commit after", "log after", "removal before", "removal after", "loading after")


def test_a_run_that_dies_at_any_moment_of_going_back_ends_the_same(settings, tmp_path):
    """Checkpoint 6 was written in the bad stretch, and must not be continued from, whoever comes upon it."""
    factors = batches(6, 11)
    runs = [Run(settings(tmp_path / "whole", checkpoint__keep=4), factors)]
    for number, moment in enumerate(MOMENTS):
        here = settings(tmp_path / str(number), checkpoint__keep=4)
        runs += [Run(here, factors, dies_at=moment), Run(here, factors)]
    (found,) = run_on_ranks(all_runs, 1, runs)
    errors = [item["error"] for item in found]
    assert errors[::2] == [None] * (len(MOMENTS) + 1)
    assert errors[1::2] == [f"DiedError: {moment}" for moment in MOMENTS]
    for number, moment in enumerate(MOMENTS):
        here = tmp_path / str(number)
        assert last_weights(here) == last_weights(tmp_path / "whole"), moment
        assert keys(here) == keys(tmp_path / "whole"), moment
        assert rollbacks(here) == rollbacks(tmp_path / "whole"), moment
        assert len(checkpoints_of(here / "checkpoints")) == 4
        assert metrics(here)[-1]["rollbacks"] == 1


@pytest.mark.parametrize(
    "moment", cases(["killed commit before", "killed commit after"], lambda moment: moment.endswith("after"))
)
def test_kill_9_around_the_rollback_and_a_stop_behind_it_change_nothing(settings, tmp_path, moment):
    factors = batches(6, 11)
    here, whole = settings(tmp_path / "killed"), settings(tmp_path / "whole")
    early = {**here, "run.max_steps": 7, "optim.lr_scheduler": "constant"}
    here["optim.lr_scheduler"] = whole["optim.lr_scheduler"] = "constant"
    with pytest.raises(RuntimeError):
        run_on_ranks(all_runs, 2, [Run(here, factors, dies_at=moment)])
    assert not (tmp_path / "killed" / "rollbacks.jsonl").exists()
    parts = [Run(early, factors), Run(here, factors)] if moment.endswith("after") else [Run(here, factors)]
    for found in run_on_ranks(all_runs, 2, [*parts, Run(whole, factors)]):
        assert {item["error"] for item in found} == {None}
    assert last_weights(tmp_path / "killed") == last_weights(tmp_path / "whole")
    assert keys(tmp_path / "killed") == keys(tmp_path / "whole")
    assert rollbacks(tmp_path / "killed") == rollbacks(tmp_path / "whole")


def test_a_spike_is_passed_over_and_too_many_end_the_run(settings, tmp_path):
    spiky = {
        "guard__spike_threshold": 30.0,
        "guard__spike_window_steps": 10,
        "guard__spike_patience_steps": 2,
        "telemetry__log_every_steps": 3,
        "run__max_steps": 16,
    }
    elsewhere = str(tmp_path / "quiet" / "checkpoints" / "step_00000014")
    runs = [
        Run(settings(tmp_path / "quiet", **spiky)),
        Run(settings(tmp_path / "outlier", **spiky), batches(13, 13, 1e4)),
        Run(settings(tmp_path / "spike", **spiky), batches(13, 14, 1e4)),
        Run(settings(tmp_path / "again", **spiky), batches(13, 14, 1e4)),
        Run(settings(tmp_path / "twice", **spiky), {**batches(13, 14, 1e4), **batches(17, 30, 1e4)}),
        Run(settings(tmp_path / "never", **spiky, guard__max_rollbacks=0), batches(13, 14, 1e4)),
        Run(settings(tmp_path / "never", **spiky, guard__max_rollbacks=0)),
        Run(settings(tmp_path / "never", **spiky, guard__max_rollbacks=1)),
        Run(
            settings(
                tmp_path / "elsewhere", **spiky, run__resume=elsewhere, checkpoint__every_steps=100,
                guard__max_nonfinite_steps=1,
            ),
            batches(15, 16),
        ),
    ]  # fmt: skip
    runs[-1].settings["run.max_steps"] = 20
    runs[4].settings["guard.max_rollbacks"] = 2
    (found,) = run_on_ranks(all_runs, 1, runs)
    errors = [item["error"] for item in found]
    assert errors[:4] == [None] * 4
    assert not (tmp_path / "quiet" / "rollbacks.jsonl").exists()
    assert not (tmp_path / "outlier" / "rollbacks.jsonl").exists()
    (went_back,) = rollbacks(tmp_path / "spike")
    assert went_back["diverged_since_step"] == 13
    assert went_back["step"] == 15
    assert went_back["checkpoint"] == "step_00000012"
    assert went_back["reason"].startswith("2 losses in a row above ")
    assert last_weights(tmp_path / "spike", 16) == last_weights(tmp_path / "again", 16)
    assert read_metrics(tmp_path / "spike" / "audit" / "rank_00000.jsonl")[-1]["step"] == 16
    went_back = rollbacks(tmp_path / "twice")
    assert [item["number"] for item in went_back] == [1, 2, 3]
    assert went_back[0]["last_position"] + 1 == went_back[1]["first_position"]
    for error in (errors[4], errors[5]):
        assert error.startswith("DivergedError: diverged since step 13: 2 losses in a row above ")
    assert "guard.max_rollbacks=2 allows: lower optim.learning_rate" in errors[4]
    assert errors[6] == errors[5], "the same command again says the same, without training"
    assert errors[7] is None
    assert metrics(tmp_path / "never")[-1]["rollbacks"] == 1
    assert "the run began at step 14 of another run" in errors[8]


def test_a_learning_rate_that_is_too_high_ends_the_command_with_one_line(tiny_models, small_corpus, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path, "world_size": 2}
    settings = ("guard.max_nonfinite_steps=3", "guard.max_rollbacks=1", "run.max_steps=20")
    rates = ("optim.learning_rate=1e30", "optim.max_grad_norm=0")
    done = forked.train("prior", *settings, *rates, **places)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("goes back from step") == 1
    last = next(line for line in done.stderr.splitlines() if "guard.max_rollbacks=1 allows" in line)
    assert "3 non-finite steps in a row" in last
    assert "go on from the initial weights with guard.max_rollbacks=2" in last
    assert len(rollbacks(tmp_path)) == 2
    done = forked.train("prior", *settings, "run.resume=never", **places)
    assert done.returncode == 78, done.stderr
    done = forked.train("prior", *settings, "guard.max_rollbacks=2", **places)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path)[-1]["rollbacks"] == 2
