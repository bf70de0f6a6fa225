"""Pipeline folders that cannot be trusted, and one network's structure, weights and fingerprint."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.load import ModelSource, freeze_statistics, pipeline_folder

PRIOR_PARTS = ("prior", "tokenizer", "text_encoder", "image_encoder", "image_processor", "scheduler")
DECODER_PARTS = ("unet", "movq", "scheduler")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path, prior_folder):
    """A copy of the prior folder, to be damaged."""
    return shutil.copytree(prior_folder, tmp_path / "prior")


def refusal(path, key="model.prior", parts=PRIOR_PARTS):
    with pytest.raises(ConfigError) as caught:
        pipeline_folder(str(path), key, parts)
    message = str(caught.value)
    print(message)
    assert message.startswith(f"{key}={path}"), message
    assert "\n" not in message
    return message


def test_a_whole_folder_is_taken_as_it_is(prior_folder, decoder_folder):
    assert pipeline_folder(str(prior_folder), "model.prior", PRIOR_PARTS) == prior_folder
    assert pipeline_folder(str(decoder_folder), "model.decoder", DECODER_PARTS) == decoder_folder


def test_the_other_pipeline_is_refused_by_its_class(prior_folder, decoder_folder):
    assert "is a KandinskyV22Pipeline" in refusal(decoder_folder)
    assert "needs a KandinskyV22Pipeline" in refusal(prior_folder, "model.decoder", DECODER_PARTS)


def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nothing")
    assert "is not a folder" in refusal("./nothing")


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be loaded from the hub" in refusal("somebody/no-such-prior")
    assert "cannot be loaded from the hub" in refusal("not a valid name!")


def test_a_folder_without_an_index_is_refused(copy):
    (copy / "model_index.json").unlink()
    assert "has no prior/model_index.json" in refusal(copy)


@pytest.mark.parametrize("part", ["prior", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy, part):
    shutil.rmtree(copy / part)
    assert f"has no folder {part}" in refusal(copy)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_an_unreadable_configuration_is_named(copy, content):
    (copy / "prior" / "config.json").write_text(content)
    assert "prior/config.json" in refusal(copy)


def test_pickled_weights_are_refused_and_never_opened(copy):
    (copy / "prior" / WEIGHTS).rename(copy / "prior" / "diffusion_pytorch_model.bin")
    assert "pickle, which is never read" in refusal(copy)


def test_missing_weights_are_named(copy):
    (copy / "text_encoder" / "model.safetensors").unlink()
    assert "has no text_encoder/model.safetensors" in refusal(copy)


@pytest.mark.parametrize("num_bytes", [0, 5, 3000, -1])
def test_truncated_weights_are_refused(copy, num_bytes):
    path = copy / "prior" / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:num_bytes])
    assert f"damaged prior/{WEIGHTS}" in refusal(copy)


def test_state_dict_is_what_the_file_holds_and_fits_the_structure(prior_folder, decoder_folder):
    for folder, component in ((prior_folder, "prior"), (decoder_folder, "unet")):
        source = ModelSource(folder, component)
        weights, held = source.state_dict(), load_file(folder / component / WEIGHTS)
        assert weights.keys() == held.keys()
        assert all(torch.equal(weights[name], held[name]) for name in held)
        module = source.build()
        module.load_state_dict(weights)
        assert module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_sharded_weights_read_as_one(copy, prior_folder):
    weights = load_file(copy / "prior" / WEIGHTS)
    names = sorted(weights)
    (copy / "prior" / WEIGHTS).unlink()
    halves = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, copy / "prior" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (copy / "prior" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    pipeline_folder(str(copy), "model.prior", PRIOR_PARTS)
    source = ModelSource(copy, "prior")
    found = source.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert source.fingerprint == ModelSource(prior_folder, "prior").fingerprint
    (copy / "prior" / "part-2.safetensors").unlink()
    assert "lacks prior/part-2.safetensors" in refusal(copy)


def test_weights_of_another_shape_than_the_configuration_are_refused(copy):
    path = copy / "prior" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 5}))
    with pytest.raises(ConfigError, match=r"no transformer_blocks\.4\..* by its config\.json"):
        ModelSource(copy, "prior").state_dict()


def test_build_reads_no_weights_and_works_on_fake_tensors(copy):
    (copy / "prior" / WEIGHTS).unlink()
    with FakeTensorMode():
        module = ModelSource(copy, "prior").build()
    assert type(module.proj_in.weight.data).__name__ == "FakeTensor"
    with torch.device("meta"):
        assert ModelSource(copy, "prior").build().proj_in.weight.is_meta


def test_fingerprint_is_of_the_architecture_alone(copy, prior_folder, other_models):
    expected = ModelSource(prior_folder, "prior").fingerprint
    assert ModelSource(other_models / "prior", "prior").fingerprint == expected, "other weights"
    path = copy / "prior" / "config.json"
    settings = json.loads(path.read_text())
    older = {name: value for name, value in settings.items() if name not in ("time_embed_dim", "dropout")}
    path.write_text(json.dumps({**older, "_diffusers_version": "0.1", "_name_or_path": "x"}))
    assert ModelSource(copy, "prior").fingerprint == expected, "another version of the library"
    path.write_text(json.dumps({**settings, "num_attention_heads": 2, "attention_head_dim": 64}))
    assert ModelSource(copy, "prior").fingerprint != expected, "same shapes, other heads"


def test_every_trained_parameter_gets_a_gradient_once_statistics_are_frozen(prior_folder):
    module = ModelSource(prior_folder, "prior").build()
    freeze_statistics(module)
    embeddings = torch.randn(2, 64)
    module(embeddings, 5, embeddings, torch.randn(2, 77, 64)).predicted_image_embedding.sum().backward()
    without = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert without == frozen == {"clip_mean", "clip_std"}


def test_messages_name_no_more_than_one_line_of_a_foreign_error(copy):
    (copy / "prior" / WEIGHTS).write_bytes(b"\xff" * 100)
    assert re.fullmatch(r".*: copy or download it again", refusal(copy))


def test_weights_of_another_folder_take_the_place_of_the_pipelines(tmp_path, prior_folder, other_models):
    """The network's own folder, or one in which it lies; what is not of the architecture plays no part."""
    other = ModelSource(other_models / "prior", "prior").state_dict()
    source = ModelSource(prior_folder, "prior")
    average = shutil.copytree(other_models / "prior" / "prior", tmp_path / "prior_ema")
    settings = json.loads((average / "config.json").read_text())
    (average / "config.json").write_text(json.dumps({**settings, "decay": 0.9999, "optimization_step": 3}))
    for name in (other_models / "prior", other_models / "prior" / "prior", average):
        found = source.with_weights(str(name))
        weights = found.state_dict()
        assert weights.keys() == other.keys()
        assert all(torch.equal(weights[name], other[name]) for name in other)
        assert found.fingerprint == source.fingerprint
        assert found.config == source.config


def test_weights_of_another_network_are_refused_in_one_line(tmp_path, prior_folder, decoder_folder):
    source = ModelSource(prior_folder, "prior")

    def refused(folder):
        with pytest.raises(ConfigError) as caught:
            source.with_weights(str(folder))
        assert str(caught.value).startswith(f"model.weights={folder} ")
        return str(caught.value)

    assert "neither config.json nor prior/config.json" in refused(tmp_path / "nothing")
    assert "neither config.json nor prior/config.json" in refused(decoder_folder)
    assert "_class_name=UNet2DConditionModel" in refused(decoder_folder / "unet")
    other = shutil.copytree(prior_folder / "prior", tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 2}))
    assert f"num_attention_heads=2, {prior_folder} has 4: the two must be of one architecture" in refused(
        other
    )
    (other / "config.json").write_text(json.dumps(settings))
    weights = load_file(other / WEIGHTS)
    save_file({**weights, "more": torch.zeros(1)}, other / WEIGHTS)
    with pytest.raises(ConfigError, match="more"):
        source.with_weights(str(other))
    (other / WEIGHTS).rename(other / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="a pickle, which is never read"):
        source.with_weights(str(other))
