"""A run that begins with the weights of another folder, and what becomes of them."""

import shutil

import pytest
import torch
from helpers.command import losses
from helpers.forked import command, train
from helpers.lines import one_line
from safetensors.torch import load_file

from kandinsky_dist.models.init import initialise

pytestmark = pytest.mark.integration

CONFIGURATION = 78
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_run_from_other_weights_is_that_of_a_pipeline_with_them(tiny_models, small_corpus, tmp_path):
    """Trained, continued, refused without them, and exported."""
    initialise("tiny", tmp_path / "other", seed=3, tokenizer=str(tiny_models / "prior"))
    shutil.copytree(tiny_models, tmp_path / "models")
    network = tmp_path / "models" / "prior" / "prior"
    shutil.copyfile(tmp_path / "other" / "prior" / "prior" / WEIGHTS, network / WEIGHTS)
    bare = shutil.copytree(tmp_path / "other" / "prior" / "prior", tmp_path / "bare")
    runs = {}
    for name, models, extra in (
        ("pipeline", tmp_path / "models", ()),
        ("weights", tiny_models, (f"model.weights={bare}",)),
        ("neither", tiny_models, ()),
    ):
        runs[name] = tmp_path / name
        done = train("prior", *extra, models=models, corpus=small_corpus, run_dir=runs[name])
        assert done.returncode == 0, done.stderr
    assert losses(runs["weights"]) == losses(runs["pipeline"])
    assert losses(runs["weights"]) != losses(runs["neither"])
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": runs["weights"]}
    done = train("prior", f"model.weights={bare}", "run.max_steps=3", **places)
    assert done.returncode == 0, done.stderr
    line = one_line(train("prior", "run.max_steps=4", **places), CONFIGURATION)
    assert line.startswith("model.weights is None, but "), line
    done = command("export", runs["weights"], tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    exported, initial = (load_file(folder / WEIGHTS) for folder in (tmp_path / "exported" / "prior", bare))
    assert torch.equal(exported["clip_mean"], initial["clip_mean"])
    assert not torch.equal(exported["proj_in.weight"], initial["proj_in.weight"])
