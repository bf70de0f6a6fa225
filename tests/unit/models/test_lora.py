"""Adapters: seeded, alone in training, and loadable by diffusers."""

import pytest
import torch
from safetensors import safe_open

from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.models.load import ModelSource
from kandinsky_dist.models.lora import WEIGHT_NAME, adapter_shapes, add_adapters, save_adapters


@pytest.fixture(params=["prior", "unet"])
def source(request, prior_folder, decoder_folder):
    return ModelSource(prior_folder if request.param == "prior" else decoder_folder, request.param)


def loaded(source):
    module = source.build().eval()
    module.load_state_dict(source.state_dict())
    return module


def output(module):
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 64, generator=generator)
    if hasattr(module, "transformer_blocks"):
        states = torch.randn(2, 77, 64, generator=generator)
        return module(embeds, 5, embeds, states).predicted_image_embedding
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return module(latents, 5, None, added_cond_kwargs={"image_embeds": embeds}).sample


def trained(module):
    """Stands in for training: every adapter weight is moved."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.02 * (1 + index % 3))
    return module


def test_only_adapters_are_trained_and_the_output_starts_unchanged(source):
    module = loaded(source)
    # torch multiplies batches of matrices in another way where the weight needs a gradient; on some CPUs the
    # two ways round differently. Adapters freeze the weights.
    before = output(module.requires_grad_(False))
    add_adapters(module, 4)
    torch.testing.assert_close(output(module), before, atol=0, rtol=0)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    num_layers = len(module.attn_processors)
    per_layer = 8 if source.component == "prior" else 12
    assert len(names) == num_layers * per_layer
    assert all("lora_" in name for name in names)
    output(module).sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == names


def test_adapters_depend_on_the_seed_alone(source):
    states = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        module = source.build()
        before = torch.random.get_rng_state()
        add_adapters(module, 2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append({name: tensor for name, tensor in module.state_dict().items() if "lora_" in name})
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    firsts = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in firsts)
    assert len({first[name].flatten()[0].item() for name in firsts}) == len(firsts), "layers differ"


def test_a_saved_folder_loads_with_diffusers_and_gives_the_same_output(source, tmp_path):
    module = loaded(source)
    base = output(module)
    add_adapters(module, 4)
    expected = output(trained(module))
    assert (expected - base).abs().max() > 1e-3
    save_adapters(source, 4, module.state_dict(), tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [WEIGHT_NAME]
    again = loaded(source)
    again.load_lora_adapter(str(tmp_path / "lora"), prefix=None, weight_name=WEIGHT_NAME)
    torch.testing.assert_close(output(again.eval()), expected, atol=1e-5, rtol=1e-5)


def test_the_file_is_the_one_diffusers_would_have_written(source, tmp_path):
    module = source.build()
    add_adapters(module, 4)
    module.save_lora_adapter(str(tmp_path / "theirs"), weight_name=WEIGHT_NAME)
    save_adapters(source, 4, module.state_dict(), tmp_path / "ours")
    with (
        safe_open(tmp_path / "theirs" / WEIGHT_NAME, framework="pt") as theirs,
        safe_open(tmp_path / "ours" / WEIGHT_NAME, framework="pt") as ours,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert len(ours.keys()) == len(adapter_shapes(source, 4))
        assert ours.metadata().keys() == theirs.metadata().keys()
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in theirs.keys())  # noqa: SIM118


def test_adapters_of_another_rank_are_refused(source, tmp_path):
    module = source.build()
    add_adapters(module, 2)
    with pytest.raises(CheckpointError, match=r"not of rank 4 .*must be \[4, "):
        save_adapters(source, 4, module.state_dict(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_rank_below_one_is_refused(source):
    with pytest.raises(ConfigError, match=r"model\.lora_rank=0 must be at least 1"):
        add_adapters(source.build(), 0)
