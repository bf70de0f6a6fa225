"""Parameter counts of the three sizes, on the meta device."""

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky_dist.models.architectures import SIZES, architecture

PUBLISHED = {
    "prior": (1_026_225_920, 338),
    "unet": (1_253_057_288, 724),
    "movq": (67_832_495, 431),
    "text_encoder": (694_659_840, 517),
    "image_encoder": (1_844_907_264, 776),
}


def build(size, name):
    settings = getattr(architecture(size), name)
    with torch.device("meta"):
        match name:
            case "prior":
                return PriorTransformer(**settings)
            case "unet":
                return UNet2DConditionModel(**settings)
            case "movq":
                return VQModel(**settings)
            case "text_encoder":
                return CLIPTextModelWithProjection(CLIPTextConfig(**settings))
            case "image_encoder":
                return CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters()), len(list(module.parameters()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_has_the_published_number_of_parameters(name):
    assert count(build("full", name)) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "low", "high"), [("prior", 55e6, 70e6), ("unet", 70e6, 85e6)])
def test_small_is_about_a_sixteenth_with_the_published_depth(name, low, high):
    num_parameters, num_tensors = count(build("small", name))
    assert low < num_parameters < high
    assert num_tensors == PUBLISHED[name][1]


@pytest.mark.parametrize("name", ["prior", "unet"])
def test_tiny_is_at_most_a_few_million(name):
    assert count(build("tiny", name))[0] < 5e6


@pytest.mark.parametrize("size", SIZES)
def test_networks_of_a_size_fit_together(size):
    shapes = architecture(size)
    width = shapes.prior["embedding_dim"]
    assert shapes.text_encoder["hidden_size"] == shapes.text_encoder["projection_dim"] == width
    assert shapes.image_encoder["projection_dim"] == shapes.unet["encoder_hid_dim"] == width
    assert shapes.unet["down_block_types"] == architecture("full").unet["down_block_types"]
    assert len(shapes.movq["block_out_channels"]) == 4, "eightfold downsampling"


def test_a_changed_copy_leaves_the_table_alone():
    architecture("tiny").unet["block_out_channels"].append(1)
    assert len(architecture("tiny").unet["block_out_channels"]) == 4
