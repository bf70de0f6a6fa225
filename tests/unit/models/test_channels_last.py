"""channels_last: where it is and where not, and that flat weights and gradients stay what they are."""

import pytest
import torch
from torch import nn

from kandinsky_dist.models.frozen import load_movq
from kandinsky_dist.models.layout import is_channels_last, lay_out_activations, lay_out_weights
from kandinsky_dist.models.load import ModelSource

LAST = torch.channels_last


def unet_of(decoder_folder):
    source = ModelSource(decoder_folder, "unet")
    model = source.build()
    model.load_state_dict(source.state_dict())
    return model


def loss_of(model):
    generator = torch.Generator().manual_seed(1)
    embeds = {"image_embeds": torch.randn(2, 64, generator=generator)}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return model(latents, torch.tensor([3, 900]), None, added_cond_kwargs=embeds).sample.square().mean()


def convolutions_of(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def test_attention_answers_in_channels_last_unless_told(decoder_folder):
    """What the layout of a plain run is for."""
    model, inputs = unet_of(decoder_folder), []
    for layer in convolutions_of(model):
        layer.register_forward_hook(lambda _layer, given, _output: inputs.append(given[0]))
    loss_of(model)
    assert any(item.is_contiguous(memory_format=LAST) and not item.is_contiguous() for item in inputs)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_trained_network_has_its_pictures_in_one_layout_and_its_weights_flat(decoder_folder, channels_last):
    plain, model = unet_of(decoder_folder), unet_of(decoder_folder)
    lay_out_activations(model, channels_last=channels_last)
    lay_out_activations(model, channels_last=channels_last)
    outputs = []
    for layer in convolutions_of(model):
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    losses = loss_of(plain), loss_of(model)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    assert len(outputs) > 30
    layout = LAST if channels_last else torch.contiguous_format
    assert all(output.is_contiguous(memory_format=layout) for output in outputs)
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad.is_contiguous(), name
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_frozen_network_has_its_weights_so(decoder_folder):
    plain, movq = (load_movq(decoder_folder, torch.float32, "cpu", encode_only=True) for _ in range(2))
    lay_out_weights(movq)
    kernels = [layer.weight for layer in movq.modules() if isinstance(layer, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=LAST) for weight in kernels)
    pixels_BCHW = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected, found = (model.encode(pixels_BCHW).latents for model in (plain, movq))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_device_decides_unless_told():
    assert is_channels_last(None) == torch.cuda.is_available()
    assert is_channels_last(True)
    assert not is_channels_last(False)
