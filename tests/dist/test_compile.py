"""Compiled training is the same training under every engine, and compiles once."""

import json

import pytest
from dist.compile_programs import train_and_count
from helpers import forked
from helpers.command import DEFAULTS, STAGE_DEFAULTS, metrics

pytestmark = pytest.mark.dist

NUM_STEPS = 3
# Name -> settings. The layers are the same; how an engine hooks into them and holds weights is its own.
FAST = {
    "ddp": {},
    "fsdp2": {"parallel.strategy": "fsdp2"},
    "zero1": {"parallel.strategy": "zero1"},
}
ALL = {
    **FAST,
    "recomputed": {"parallel.gradient_checkpointing": True},
    "bf16": {"parallel.precision": "bf16"},
    "fsdp2_recomputed": {"parallel.strategy": "fsdp2", "parallel.gradient_checkpointing": True},
    "zero0": {"parallel.strategy": "zero0"},
    "zero2": {"parallel.strategy": "zero2"},
}


def settings_of(stage, tiny_models, small_corpus, run_dir, **extra):
    return {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        "run.max_steps": NUM_STEPS,
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "run.dir": str(run_dir),
        **extra,
    }


def trained(stage, cases, out, world_size=2, timeout=1500):
    """Case -> (what rank 0 compiled, loss and gradient norm of each step)."""
    done = forked.call(train_and_count, stage, cases, out, world_size=world_size, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return {
        name: (
            json.loads((out / f"{name}_rank_0.json").read_text()),
            [value for entry in metrics(out / name) for value in (entry["loss"], entry["grad_norm"])],
        )
        for name in cases
    }


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    "engines", [FAST, pytest.param(ALL, marks=pytest.mark.campaign)], ids=["some", "all"]
)
def test_every_engine_trains_as_it_does_without_and_a_second_start_compiles_nothing(
    engines, tiny_models, small_corpus, tmp_path
):
    cases = {"eager": settings_of("prior", tiny_models, small_corpus, tmp_path / "eager")}
    for name, extra in engines.items():
        cases[name] = settings_of("prior", tiny_models, small_corpus, tmp_path / name, **extra) | {
            "parallel.compile": True,
            "parallel.compile_cache": str(tmp_path / "cache"),
        }
    found = trained("prior", cases, tmp_path)
    for name in engines:
        compiled, figures = found[name]
        tolerance = 0.03 if name == "bf16" else 2e-5
        assert figures == pytest.approx(found["eager"][1], rel=tolerance), name
        assert len(set(compiled["graphs"])) == 1, f"{name} compiled after its first step: {compiled}"
    assert found["eager"][0]["graphs"] == [0] * NUM_STEPS
    # A layer of the prior and its last one, a layer of CLIP's text tower and of its vision tower.
    assert found["ddp"][0]["graphs"][0] == 4
    assert found["ddp"][0]["made"] > 0
    again = tmp_path / "again"
    again.mkdir()
    start = {"ddp": cases["ddp"] | {"run.dir": str(again / "ddp")}}
    second, figures = trained("prior", start, again)["ddp"]
    assert figures == found["ddp"][1], "cached code computed something else"
    assert second["graphs"][0] == 4
    assert second["made"] == 0, second
    assert second["cached"] > 0, second


@pytest.mark.campaign  # minutes of C++ compilation
@pytest.mark.timeout(3600)
def test_the_decoder_trains_as_it_does_without(tiny_models, small_corpus, tmp_path):
    cases = {
        name: settings_of("decoder", tiny_models, small_corpus, tmp_path / name)
        | {"parallel.compile": name != "eager", "parallel.channels_last": True}
        for name in ("eager", "compiled")
    }
    found = trained("decoder", cases, tmp_path, world_size=1, timeout=3000)
    assert found["compiled"][1] == pytest.approx(found["eager"][1], rel=1e-4)
    assert len(set(found["compiled"][0]["graphs"])) == 1
