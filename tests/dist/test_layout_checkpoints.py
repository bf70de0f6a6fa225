"""Pictures in channels_last: every engine's checkpoint of the decoder loads in every other, bit for bit."""

import json

import pytest
import torch
from dist.programs import go_on_from, train_each
from helpers import forked
from helpers.command import DEFAULTS, STAGE_DEFAULTS, losses

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.parallel.base import FRAGMENT_KINDS

pytestmark = pytest.mark.dist

ENGINES = ("ddp", "fsdp2", "zero0", "zero2", "zero3")
FAST = ("ddp", "fsdp2", "zero2")
SAVED_AT, NUM_STEPS = 1, 2


def settings_of(strategy, tiny_models, small_corpus, run_dir):
    return {
        **DEFAULTS,
        **STAGE_DEFAULTS["decoder"],
        "run.max_steps": NUM_STEPS,
        "checkpoint.every_steps": SAVED_AT,
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "run.dir": str(run_dir),
        "parallel.strategy": strategy,
        "parallel.channels_last": True,
    }


@pytest.mark.parametrize(
    ("engines", "readers"),
    [(FAST, ("fsdp2",)), pytest.param(ENGINES, ("ddp", "fsdp2", "zero3"), marks=pytest.mark.campaign)],
    ids=["some", "all"],
)
def test_checkpoints_are_the_same_bits_under_every_engine(
    engines, readers, tiny_models, small_corpus, tmp_path
):
    cases = [settings_of(name, tiny_models, small_corpus, tmp_path / name) for name in engines]
    done = forked.call(train_each, "decoder", cases, world_size=2, timeout=550)
    assert done.returncode == 0, done.stderr
    checkpoints = {name: tmp_path / name / "checkpoints" / f"step_{SAVED_AT:08d}" for name in engines}
    for engine in readers:
        out = tmp_path / f"in_{engine}"
        settings = settings_of(engine, tiny_models, small_corpus, tmp_path / f"reader_{engine}")
        steps = NUM_STEPS - SAVED_AT
        done = forked.call(
            go_on_from, "decoder", settings, checkpoints, steps, out, world_size=2, timeout=550
        )
        assert done.returncode == 0, done.stderr
        for name, folder in checkpoints.items():
            saved, held = CheckpointReader(folder), CheckpointReader(out / name)
            assert saved.numels == held.numels
            for parameter, numel in saved.numels.items():
                for kind in FRAGMENT_KINDS:
                    ours, theirs = (reader.read(parameter, kind, 0, numel) for reader in (saved, held))
                    assert torch.equal(ours, theirs), (engine, name, parameter, kind)
            found = json.loads((out / name / "losses.json").read_text())
            assert found == pytest.approx(losses(tmp_path / name)[SAVED_AT:], abs=1e-5), (engine, name)
