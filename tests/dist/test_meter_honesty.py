"""The meter of a real run: its rates times its seconds are what was trained, whatever pauses there were."""

import json

import pytest
from dist.meter_programs import PAUSE_SECONDS, STEP_SECONDS, counted_run, run_on_a_clock
from helpers import forked
from helpers.command import DEFAULTS, STAGE_DEFAULTS, metrics

pytestmark = pytest.mark.dist

NUM_STEPS, BATCH = 12, 8
PAUSES = (
    "run.max_steps=12",
    "validation.every_steps=3",
    "validation.num_samples=8",
    "checkpoint.every_steps=4",
)


def settings_of(stage, tiny_models, small_corpus, tmp_path):
    return {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "validation.shards": str(small_corpus / "validation"),
        "run.dir": str(tmp_path / "run"),
        "telemetry.log_every_steps": 2,
        **dict(item.split("=", 1) for item in PAUSES),
    }


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_rate_times_seconds_is_samples_over_a_run_with_pauses(stage, tiny_models, small_corpus, tmp_path):
    """From the command line, as anybody reads it: the entries of metrics.jsonl and nothing else."""
    done = forked.train(
        stage,
        *PAUSES,
        "telemetry.log_every_steps=2",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    entries = metrics(tmp_path / "run")
    counted = trained = before = 0
    for entry in entries:
        num_steps, before = entry["step"] - before, entry["step"]
        counted += entry["samples_per_second"] * entry["step_seconds"] * num_steps
        trained = entry["samples_consumed"]
    assert trained == NUM_STEPS * BATCH
    assert counted == pytest.approx(trained, rel=0.01)
    assert sum("validation_loss" in entry for entry in entries) == NUM_STEPS // 3


def test_validation_and_checkpoints_are_no_part_of_a_step(tiny_models, small_corpus, tmp_path):
    """The real trainer on a clock of the test's: pauses take two thousand times as long as steps."""
    assert PAUSE_SECONDS == 2000 * STEP_SECONDS
    settings = settings_of("prior", tiny_models, small_corpus, tmp_path)
    done = forked.call(run_on_a_clock, "prior", settings, world_size=1)
    assert done.returncode == 0, done.stderr
    entries = metrics(tmp_path / "run")
    assert len(entries) >= NUM_STEPS // 2
    for entry in entries:
        assert entry["step_seconds"] == pytest.approx(STEP_SECONDS), entry
        assert entry["samples_per_second"] == pytest.approx(BATCH / STEP_SECONDS), entry


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_flops_are_those_of_an_independent_count(stage, tiny_models, small_corpus, tmp_path):
    settings = settings_of(stage, tiny_models, small_corpus, tmp_path)
    settings |= {"validation.every_steps": 0, "checkpoint.every_steps": 1000, "telemetry.log_every_steps": 1}
    done = forked.call(counted_run, stage, settings, tmp_path / "flops.json", world_size=1)
    assert done.returncode == 0, done.stderr
    total = json.loads((tmp_path / "flops.json").read_text())
    # A backward pass is twice the forward, but for the first layers, whose inputs need no gradient.
    expected = total["frozen"] + 3 * total["trained"]
    reported = sum(
        entry["tflops_per_second"] * 1e12 * entry["step_seconds"] for entry in metrics(tmp_path / "run")
    )
    assert reported == pytest.approx(expected, rel=0.01), total
