"""Chosen steps leave a trace that names the parts of a step."""

import gzip
import json

import pytest
from helpers import forked

pytestmark = pytest.mark.integration

PARTS = {"data", "encoders", "forward", "backward", "optimizer", "ema"}


def ranges_of(path):
    """Name -> how often a range of that name is in the trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in PARTS if name in names}


def test_chosen_steps_of_chosen_ranks_leave_traces(tiny_models, small_corpus, tmp_path):
    done = forked.train(
        "prior",
        "run.max_steps=7",
        "telemetry.profile=[2,4:5]",
        "telemetry.profile_ranks=[1]",
        "data.micro_batch_size=2",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
        world_size=2,
    )
    assert done.returncode == 0, done.stderr
    traces = {path.name: ranges_of(path) for path in sorted((tmp_path / "profile").iterdir())}
    once = dict.fromkeys(PARTS, 1) | {"forward": 2, "backward": 2}  # two micro-batches
    assert traces == {
        "steps_00000002_00000002_rank_00001.json.gz": once,
        "steps_00000004_00000005_rank_00001.json.gz": {name: 2 * number for name, number in once.items()},
    }


def test_a_run_that_ends_in_a_stretch_keeps_what_there_is(tiny_models, small_corpus, tmp_path):
    done = forked.train(
        "prior",
        "run.max_steps=3",
        "telemetry.profile=2:100",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_00000002_00000003_rank_00000.json.gz"
    assert ranges_of(trace)["optimizer"] == 2
