"""Folders of other trainers: each thing that does not fit is one line, and no code in them is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.script_folder import save_script_folder

from kandinsky_dist.checkpoint.foreign import saved as saved_module
from kandinsky_dist.checkpoint.foreign.convert import convert
from kandinsky_dist.checkpoint.foreign.kinds import Kind, saved_by
from kandinsky_dist.checkpoint.foreign.plain import load_plain
from kandinsky_dist.checkpoint.layout import CheckpointReader, damage
from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.models.load import ModelSource


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def script_folder(tiny_models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("script")
    return save_script_folder(tiny_models / "prior", "prior", out, num_steps=3, use_ema=True)


@pytest.fixture
def copy(script_folder, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(script_folder, tmp_path / script_folder.name))


def made(src: Path, out: Path, *, step: int | None = None, batch: int | None = None) -> list[str]:
    return convert(src, out, step=step, global_batch_size=batch)


def refusal(src: Path, *, step: int | None = None, batch: int | None = 8) -> str:
    out = src.parent / "refused"
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        made(src, out, step=step, batch=batch)
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert not out.exists()
    assert not list(src.parent.glob(".refused*"))
    return message


def change(path: Path, edit) -> None:
    """Edits what torch.save wrote."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def test_pickled_objects_are_not_run(copy, tmp_path):
    path, made_by_code = copy / "optimizer.bin", tmp_path / "ran"
    torch.save({"state": Evil(made_by_code)}, path)
    assert "holds objects beside tensors" in refusal(copy)
    assert not made_by_code.exists()


@pytest.mark.parametrize("num_bytes", [0, 10, 5000, -1])
def test_a_truncated_file_is_damaged(copy, num_bytes):
    path = copy / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert f"{path}" in refusal(copy)


def test_the_random_states_are_never_read(copy, tmp_path):
    for name in ("random_states_0.pkl", "scheduler.bin"):
        (copy / name).write_bytes(b"no pickle")
    made(copy, tmp_path / "out", batch=8)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda saved: saved.pop("state"), "is not the state of an optimizer"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "parameters, the network beside it has"),
        (lambda saved: saved["state"][5].pop("exp_avg"), "exp_avg of parameter 5"),
        (lambda saved: saved["state"][5].update(exp_avg_sq=torch.zeros(3)), "exp_avg_sq of parameter 5"),
        (lambda saved: saved["state"][5]["step"].add_(1), "must be one number"),
        (lambda saved: [state["step"].add_(1) for state in saved["state"].values()], "has taken 4 steps"),
        (lambda saved: saved["state"].clear(), "must be one number"),
    ],
)
def test_an_optimizer_that_does_not_fit_the_network_is_refused(edit, reason, copy):
    change(copy / "optimizer.bin", edit)
    assert reason in refusal(copy)


def test_what_an_optimizer_has_skipped_is_counted(copy, tmp_path):
    change(copy / "optimizer.bin", lambda saved: [item["step"].sub_(1) for item in saved["state"].values()])
    made(copy, tmp_path / "out", batch=8)
    run = CheckpointReader(tmp_path / "out" / "checkpoints" / "step_00000003").state.run
    assert (run.step, run.num_updates, run.num_skipped_steps) == (3, 2, 1)


def test_a_parameter_without_a_gradient_begins_with_moments_of_0(copy, tmp_path):
    change(copy / "optimizer.bin", lambda saved: saved["state"].pop(5))
    made(copy, tmp_path / "out", batch=8)
    reader = CheckpointReader(tmp_path / "out" / "checkpoints" / "step_00000003")
    name = [name for name, _ in ModelSource(copy, "prior").build().named_parameters()][5]
    for kind in ("exp_avg", "exp_avg_sq"):
        values = reader.read(name, kind, 0, reader.numels[name])
        assert values.count_nonzero() == 0


def test_what_the_folder_does_not_say_is_asked_for(copy):
    assert "give --global-batch-size" in refusal(copy, batch=None)
    assert "--global-batch-size=0 must be above 0" in refusal(copy, batch=0)
    renamed = copy.rename(copy.with_name("last"))
    assert "say N with --step" in refusal(renamed)
    made(renamed, copy.parent / "out", step=3, batch=8)


def test_an_average_of_another_kind_is_refused(copy, tmp_path):
    path = copy / "prior_ema" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_ema_warmup": True}))
    assert 'average with {"use_ema_warmup": true}' in refusal(copy)
    shutil.rmtree(copy / "prior_ema")
    made(copy, tmp_path / "out", batch=8)


def test_files_are_as_large_as_they_may_be_and_no_larger(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_module, "FILE_BYTES", 2**20)
    made(copy, tmp_path / "out", batch=8)
    folder = tmp_path / "out" / "checkpoints" / "step_00000003"
    assert damage(folder) is None
    files = sorted(folder.glob("rank_*.safetensors"))
    assert len(files) > 5
    weights = ModelSource(copy, "prior").state_dict()
    reader = CheckpointReader(folder)
    for name, numel in reader.numels.items():
        assert reader.read(name, "master", 0, numel).equal(weights[name].flatten())


def test_an_existing_folder_is_not_written_into(script_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        made(script_folder, tmp_path, batch=8)


@pytest.fixture(scope="module")
def converted(script_folder, tmp_path_factory) -> Path:
    """ours/, a run folder made of the script's, and universal/ made of that. Read only."""
    folder = tmp_path_factory.mktemp("converted")
    made(script_folder, folder / "ours", batch=8)
    made(folder / "ours", folder / "universal")
    return folder


@pytest.fixture
def universal(converted, tmp_path) -> Path:
    """One of DeepSpeed's layout, without what only ours have, to be damaged."""
    shutil.copytree(converted / "universal", tmp_path / "universal")
    folder = tmp_path / "universal" / "global_step3_universal"
    for name in ("state.json", "config.yaml"):
        (folder / name).unlink()
    return folder


def test_a_universal_checkpoint_says_its_steps_and_samples(universal, tmp_path):
    made(universal.parent, tmp_path / "out")
    state = CheckpointReader(tmp_path / "out" / "checkpoints" / "step_00000003").state
    assert (state.run.step, state.run.samples_consumed, state.run.num_updates) == (3, 24, 3)
    assert state.run.began_at_step == state.run.health.last_healthy_step == 3
    assert state.identity == {"stage": "prior", "model.variant": "full", "data.global_batch_size": 8}


def test_options_stand_in_for_what_it_does_not_say(universal, tmp_path):
    evil = tmp_path / "ran"
    for path in universal.glob("*_model_states.pt"):
        torch.save({"client": Evil(evil)}, path)
    assert "give --step and --global-batch-size in its place" in refusal(universal, batch=None)
    assert "give --step and --global-batch-size in its place" in refusal(universal, batch=16)
    made(universal, tmp_path / "out", step=7, batch=16)
    run = CheckpointReader(tmp_path / "out" / "checkpoints" / "step_00000007").state.run
    assert (run.step, run.samples_consumed, run.num_updates) == (7, 112, 3)
    assert not evil.exists()


def test_a_universal_checkpoint_that_is_not_whole_is_refused(universal):
    zero = universal / "zero"
    name = "proj_in.weight"
    (zero / name / "exp_avg_sq.pt").rename(zero / "kept")
    assert "exp_avg_sq.pt is missing" in refusal(universal, batch=None)
    torch.save({"param": torch.zeros(5)}, zero / name / "exp_avg_sq.pt")
    assert f"{zero / name}: its tensors have" in refusal(universal, batch=None)
    torch.save({"param": torch.zeros(5, dtype=torch.int64)}, zero / name / "exp_avg_sq.pt")
    assert "is no tensor of real numbers" in refusal(universal, batch=None)
    (zero / "kept").replace(zero / name / "exp_avg_sq.pt")
    torch.save(torch.tensor(9.0), zero / name / "step.pt")
    assert "have taken [3, 9] steps" in refusal(universal, batch=None)
    shutil.rmtree(zero / name)
    assert f"{zero / name} has no values, the model had" in refusal(universal, batch=None)


def test_parameters_of_another_network_are_refused(universal):
    for path in (universal / "zero").iterdir():
        if path.is_dir():
            path.rename(path.with_name(f"module.{path.name}"))
    assert "must have been trained" in refusal(universal, batch=None)


def test_whose_folder_it_is(script_folder, converted, universal, tiny_models, tmp_path):
    assert saved_by(script_folder) is Kind.SCRIPT
    assert saved_by(script_folder.parent) is Kind.SCRIPT_RUN
    assert saved_by(universal) is saved_by(universal.parent) is Kind.UNIVERSAL
    assert saved_by(converted / "ours") is Kind.OWN
    assert saved_by(tiny_models / "prior") is saved_by(tiny_models / "prior" / "prior") is Kind.PIPELINE
    (tmp_path / "empty").mkdir()
    assert saved_by(tmp_path / "empty") is None


def test_what_cannot_be_converted_says_what_to_do(script_folder, converted, tiny_models, tmp_path):
    copy = Path(shutil.copytree(tiny_models / "prior", tmp_path / "pipeline"))
    assert "used as it is: model.prior, model.decoder or model.weights" in refusal(copy)
    (tmp_path / "scripts").mkdir()
    shutil.copytree(script_folder, tmp_path / "scripts" / "checkpoint-3")
    assert "name one of its checkpoint-N folders" in refusal(tmp_path / "scripts")
    (tmp_path / "empty").mkdir()
    assert "neither a run of kandinsky-dist, a universal checkpoint" in refusal(tmp_path / "empty")
    assert "is no folder" in refusal(tmp_path / "nothing")
    assert "do not apply" in refusal(converted / "ours")
    shutil.rmtree(tmp_path / "scripts" / "checkpoint-3" / "prior")
    assert "has no folder prior or unet" in refusal(tmp_path / "scripts" / "checkpoint-3")


def test_a_file_that_is_none_of_torch_save(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged, or no file"):
        load_plain(tmp_path / "x")
    with pytest.raises(CheckpointError, match="is missing"):
        load_plain(tmp_path / "y")
