"""Regions compile whole, into few graphs, and text lengths cost one graph each, once.

Graphs are captured and differentiated as in training, but run as torch operators: to make C++ of them would
take minutes and is what test_compile does for the prior.
"""

import copy

import diffusers
import pytest
import torch
from helpers.campaign import cases
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models import compiled
from kandinsky_dist.models.blocks import blocks, enable_gradient_checkpointing, set_attention
from kandinsky_dist.models.frozen import load_image_encoder, load_movq, load_text_encoder
from kandinsky_dist.models.layout import lay_out_activations
from kandinsky_dist.models.load import ModelSource, freeze_statistics
from kandinsky_dist.models.prior import make_pad_free

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
SMALL_UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv(compiled.CACHE_VARIABLE, "")
    with dynamo_config.patch(recompile_limit=8):
        compiled.prepare_compiler(CPU, tmp_path)
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def graphs_of(action):
    """Graphs that an action compiles, and what it returns."""
    before = compiled.num_graphs()
    result = action()
    return compiled.num_graphs() - before, result


def prior_of(tiny_models):
    source = ModelSource(tiny_models / "prior", "prior")
    model = source.build()
    model.load_state_dict(source.state_dict())
    freeze_statistics(model)
    make_pad_free(model)
    return model


def step(model, length, num_text_tokens=None):
    """Loss and gradients of two texts, one of some length and one of 5 tokens."""
    generator = torch.Generator().manual_seed(length)
    width = model.config.embedding_dim
    predicted = model(
        torch.randn(2, width, generator=generator),
        torch.tensor([3, 900]),
        torch.randn(2, width, generator=generator),
        torch.randn(2, length, width, generator=generator),
        torch.arange(length)[None] < torch.tensor([[length], [5]]),
        num_text_tokens,
    ).predicted_image_embedding
    model.zero_grad()
    loss = predicted.square().mean()
    loss.backward()
    return loss, {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("is_recomputed", cases([False, True], lambda is_recomputed: not is_recomputed))
def test_a_length_costs_two_graphs_for_all_layers_and_then_nothing(is_recomputed, tiny_models):
    plain, model = prior_of(tiny_models), prior_of(tiny_models)
    names = list(model.state_dict())
    if is_recomputed:
        enable_gradient_checkpointing(model)
    compiled.compile_blocks(model, backend="aot_eager")
    compiled.compile_blocks(model, backend="aot_eager")
    lengths = (8, 16, 24, 40, 77)  # more graphs than torch's own limit of 8
    for length in lengths:
        num_graphs, (loss, gradients) = graphs_of(lambda length=length: step(model, length))
        assert num_graphs == 2, f"{num_graphs} graphs for {len(blocks(model)) - 1} equal layers and the last"
        expected_loss, expected = step(plain, length)
        torch.testing.assert_close(loss, expected_loss)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    with dynamo_config.patch(error_on_recompile=True):
        num_graphs, _ = graphs_of(lambda: [step(model, length) for length in reversed(lengths)])
    assert num_graphs == 0
    assert list(model.state_dict()) == names


def test_packed_texts_cost_two_graphs_for_each_number_of_tokens(tiny_models):
    plain, model = prior_of(tiny_models), prior_of(tiny_models)
    compiled.compile_blocks(model, backend="aot_eager")
    for length, num_text_tokens, expected_graphs in ((16, 24, 2), (24, 32, 2), (16, 24, 0), (24, 36, 2)):
        num_graphs, (_, gradients) = graphs_of(lambda of=(length, num_text_tokens): step(model, *of))
        assert num_graphs == expected_graphs
        for name, gradient in step(plain, length)[1].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_more_shapes_than_there_is_room_for_are_an_error_and_not_a_slow_layer(tiny_models):
    model = prior_of(tiny_models)
    compiled.compile_blocks(model, backend="aot_eager")
    with dynamo_config.patch(recompile_limit=2):
        step(model, 8)
        with pytest.raises(FailOnRecompileLimitHit):
            step(model, 16)


def test_the_unet_is_a_graph_a_block(tiny_models):
    source = ModelSource(tiny_models / "decoder", "unet")

    def build():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel.from_config(source.config | SMALL_UNET).train()

    def unet_step(model):
        generator = torch.Generator().manual_seed(1)
        embeds = {"image_embeds": torch.randn(2, 64, generator=generator)}
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        sample = model(latents, torch.tensor([3, 900]), None, added_cond_kwargs=embeds).sample
        sample.square().mean().backward()
        return {name: item.grad for name, item in model.named_parameters()}

    model = build()
    set_attention(model, "flash")  # all that may be switched on goes into the graph
    lay_out_activations(model, channels_last=True)
    enable_gradient_checkpointing(model)
    compiled.compile_blocks(model, backend="aot_eager")
    num_graphs, gradients = graphs_of(lambda: unet_step(model))
    assert num_graphs == len(blocks(model)) == 5
    for name, gradient in unet_step(build()).items():
        assert gradients[name].is_contiguous(), name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert graphs_of(lambda: unet_step(model))[0] == 0


def test_frozen_encoders_are_a_graph_a_kind_of_layer(tiny_models):
    text = load_text_encoder(tiny_models / "prior", torch.float32, CPU)
    image = load_image_encoder(tiny_models / "prior", torch.float32, CPU)
    movq = load_movq(tiny_models / "decoder", torch.float32, CPU, encode_only=True)
    side = image.config.image_size
    pixels_BCHW = torch.randn(2, 3, side, side)
    tokens_BL = torch.randint(0, 1000, (2, 24))
    cases = [
        (text, lambda model: model(tokens_BL).last_hidden_state),
        (image, lambda model: model(pixels_BCHW).image_embeds),
        (movq, lambda model: model.encode(pixels_BCHW).latents),
    ]
    with torch.no_grad():
        for model, run in cases:
            expected = run(model)
            compiled.compile_encoder(model, backend="aot_eager")
            num_graphs, found = graphs_of(lambda run=run, model=model: run(model))
            assert num_graphs == 1, type(model)
            torch.testing.assert_close(found, expected)
            assert graphs_of(lambda run=run, model=model: run(model))[0] == 0


def test_a_copy_is_not_compiled_and_is_a_copy(tiny_models):
    model = prior_of(tiny_models)
    compiled.compile_blocks(model, backend="aot_eager")
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    num_graphs, (loss, _) = graphs_of(lambda: step(twin, 8))
    assert num_graphs == 0
    expected, _ = step(model, 8)
    assert loss != expected, "the copy computes with the original's weights"


def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ConfigError, match=r"no-such-compiler on PATH.*parallel.compile=false"):
        compiled.prepare_compiler(CPU, tmp_path)
