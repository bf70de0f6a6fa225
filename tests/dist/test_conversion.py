"""What DeepSpeed or the diffusers scripts saved goes on here, and what we saved goes on there."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dist.conversion_programs import (
    go_on_beside_a_script,
    load_with_deepspeed,
    to_universal,
    train_and_save_with_deepspeed,
)
from helpers import forked
from helpers.campaign import cases
from helpers.command import DEFAULTS, STAGE_DEFAULTS, losses, train_arguments
from helpers.script_folder import save_script_folder
from safetensors.torch import load_file

from kandinsky_dist.checkpoint.layout import CheckpointReader, damage
from kandinsky_dist.parallel.base import FRAGMENT_KINDS
from kandinsky_dist.parallel.ds_config import shipped_file

pytestmark = pytest.mark.dist

SAVED_AT, NUM_STEPS = 3, 6
SETTINGS = {
    "run.max_steps": NUM_STEPS,
    "checkpoint.every_steps": SAVED_AT,
    "data.global_batch_size": 12,
    "data.micro_batch_size": 2,
    "optim.weight_decay": 0.01,
    "optim.ema_decay": "[0.9]",
}
STRATEGIES = ("zero2", "zero3")
LOADERS = cases(
    product(STRATEGIES, ("zero1", "zero2", "zero3"), (1, 2, 3)),
    [("zero2", "zero2", 2), ("zero3", "zero3", 2), ("zero2", "zero1", 1)].__contains__,
)
"""Strategy that saves, strategy and number of ranks that DeepSpeed loads under."""


def settings_for(models: Path, corpus: Path, run_dir: Path, strategy: str, **extra: Any) -> dict[str, Any]:
    return {
        **DEFAULTS,
        **SETTINGS,
        "model.prior": str(models / "prior"),
        "data.shards": str(corpus / "train"),
        "run.dir": str(run_dir),
        "parallel.strategy": strategy,
        **extra,
    }


@pytest.fixture(scope="module", params=STRATEGIES)
def saved(request, tiny_models, small_corpus, tmp_path_factory) -> tuple[str, Path]:
    """A run that never stopped, in RUN; beside it what DeepSpeed saved at one step of it, in DS."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = settings_for(tiny_models, small_corpus, folder / "run", request.param)
    done = forked.call(
        train_and_save_with_deepspeed, settings, folder / "ds", SAVED_AT, world_size=2, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return request.param, folder


def convert(*words: object) -> str:
    done = forked.command("checkpoint", "convert", *words, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def checkpoint_of(run: Path, step: int = SAVED_AT) -> CheckpointReader:
    folder = run / "checkpoints" / f"step_{step:08d}"
    assert damage(folder) is None
    return CheckpointReader(folder)


def assert_same_bits(found: CheckpointReader, expected: CheckpointReader) -> None:
    assert found.numels == expected.numels
    for name, numel in expected.numels.items():
        for kind in FRAGMENT_KINDS:
            ours, theirs = (reader.read(name, kind, 0, numel) for reader in (found, expected))
            assert torch.equal(ours, theirs), (name, kind)


def test_what_deepspeed_saved_goes_on_as_if_it_had_never_stopped(saved, tiny_models, small_corpus, tmp_path):
    strategy, folder = saved
    partitions = folder / "ds" / f"global_step{SAVED_AT}"
    refused = forked.command("checkpoint", "convert", folder / "ds", tmp_path / "out")
    assert refused.returncode == 1
    words = f"--input_folder {partitions} --output_folder {partitions}_universal"
    assert f"python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state {words}" in refused.stderr
    done = forked.call(to_universal, partitions, Path(f"{partitions}_universal"), timeout=300)
    assert done.returncode == 0, done.stderr
    said = convert(folder / "ds", tmp_path / "out")
    assert f"continue with run.resume={tmp_path / 'out'}, at step {SAVED_AT} and sample 36" in said
    assert_same_bits(checkpoint_of(tmp_path / "out"), checkpoint_of(folder / "run"))
    arguments = {**SETTINGS, "optim.ema_decay": "[]", "run.resume": tmp_path / "out"}
    done = forked.train(
        "prior",
        *(f"{key}={value}" for key, value in arguments.items()),
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
        world_size=2,
        strategy=strategy,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(folder / "run")[SAVED_AT:]


def test_ours_as_theirs_and_back_is_the_same_to_the_last_bit(saved, tmp_path):
    _, folder = saved
    convert(folder / "run" / "checkpoints" / f"step_{SAVED_AT:08d}", tmp_path / "universal")
    convert(tmp_path / "universal", tmp_path / "back")
    before, after = checkpoint_of(folder / "run"), checkpoint_of(tmp_path / "back")
    assert before.kinds == after.kinds == {*FRAGMENT_KINDS, "ema_0.9"}
    assert_same_bits(after, before)
    for name, numel in before.numels.items():
        assert torch.equal(*(reader.read(name, "ema_0.9", 0, numel) for reader in (before, after)))
    assert after.state == before.state
    assert (after.folder / "config.yaml").read_bytes() == (before.folder / "config.yaml").read_bytes()


@pytest.mark.parametrize(("saved", "loading", "world_size"), LOADERS, indirect=["saved"])
def test_deepspeeds_own_loader_goes_on_from_ours(
    saved, loading, world_size, tiny_models, small_corpus, tmp_path
):
    saving, folder = saved
    before = checkpoint_of(folder / "run")
    convert(before.folder, tmp_path / "universal")
    config = json.loads(shipped_file(loading).read_text()) | {"checkpoint": {"load_universal": True}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    extra = {"parallel.ds_config": str(tmp_path / "ds.json"), "optim.ema_decay": "[]"}
    settings = settings_for(tiny_models, small_corpus, tmp_path / "run", loading, **extra)
    done = forked.call(
        load_with_deepspeed, settings, tmp_path / "universal", NUM_STEPS - SAVED_AT, tmp_path,
        world_size=world_size, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_bits(CheckpointReader(tmp_path), before)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["updates"] == [SAVED_AT]
    assert (found["steps"], found["samples"]) == (SAVED_AT, 36)
    assert found["is_published"]
    assert found["schedule"] == {"last_batch_iteration": SAVED_AT - 1}
    expected = losses(folder / "run")[SAVED_AT:]
    if (loading, world_size) == (saving, 2):
        assert found["losses"] == expected
    assert found["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_what_a_diffusers_script_saved_goes_on(stage, tiny_models, small_corpus, tmp_path):
    """Weights, moments and average to the last bit, and then AdamW's own steps."""
    component = "prior" if stage == "prior" else "unet"
    arguments = {"num_steps": 4, "use_ema": True}
    done = forked.call(save_one, tiny_models / stage, component, tmp_path / "theirs", arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "theirs" / "checkpoint-4"
    said = convert(folder, tmp_path / "ours", "--global-batch-size", 8)
    assert "optim.ema_decay=[0.9999]" in said
    saved = checkpoint_of(tmp_path / "ours", 4)
    names = assert_is_what_the_script_holds(saved, folder, component)
    run = saved.state.run
    assert (run.step, run.samples_consumed, run.num_updates) == (4, 32, 4)
    assert run.num_averaged == {"ema_0.9999": 4}
    words = train_arguments(
        stage,
        f"run.resume={tmp_path / 'ours'}",
        "run.max_steps=9",
        "optim.ema_decay=0.9999",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
        strategy="ddp",
    )
    settings = {
        **DEFAULTS,
        **STAGE_DEFAULTS[stage],
        **dict(word.removeprefix("--").split("=", 1) for word in words[2:]),
    }
    done = forked.call(go_on_beside_a_script, stage, settings, folder, 3, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "average with decay" not in done.stderr, "it must not be dropped or begun anew"
    differences = json.loads((tmp_path / "differences.json").read_text())
    assert differences.keys() == names
    # A softmax does not see what is added to all keys: that gradient is rounding, which AdamW scales up.
    seen = [value for name, value in differences.items() if not name.endswith("attn1.to_k.bias")]
    print(f"{stage}: largest difference over change {max(seen):.1e}")
    assert max(seen) < 1e-4


def save_one(pipeline: Path, component: str, out: Path, arguments: dict[str, Any]) -> None:
    save_script_folder(pipeline, component, out, **arguments)


def assert_is_what_the_script_holds(saved: CheckpointReader, folder: Path, component: str) -> set[str]:
    """Compares with the files as their own libraries read them; returns the trained parameters."""
    from diffusers import PriorTransformer, UNet2DConditionModel

    network_class = PriorTransformer if component == "prior" else UNet2DConditionModel
    network = network_class.from_pretrained(folder, subfolder=component)
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.load_state_dict(torch.load(folder / "optimizer.bin", weights_only=True))
    average = load_file(folder / f"{component}_ema" / "diffusion_pytorch_model.safetensors")
    names = set()
    for name, parameter in network.named_parameters():
        if name in ("clip_mean", "clip_std"):
            assert name not in saved.numels
            continue
        names.add(name)
        state = optimizer.state[parameter]
        expected = {"master": parameter.detach(), "ema_0.9999": average[name], **state}
        for kind in (*FRAGMENT_KINDS, "ema_0.9999"):
            assert torch.equal(saved.read(name, kind, 0, parameter.numel()), expected[kind].flatten()), name
    assert saved.numels.keys() == names
    return names
