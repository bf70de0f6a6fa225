import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kandinsky_dist.telemetry.flops import count_flops, without_memory

PRIOR_CONFIG = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 1280,
    "num_embeddings": 77,
    "additional_embeddings": 4,
}
UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 8,
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "block_out_channels": [384, 768, 1152, 1536],
    "layers_per_block": 3,
    "cross_attention_dim": 768,
    "encoder_hid_dim": 1280,
    "encoder_hid_dim_type": "image_proj",
    "attention_head_dim": 64,
    "addition_embed_type": "image",
    "resnet_time_scale_shift": "scale_shift",
}


def forward_flops(function):
    with torch.no_grad():
        return count_flops(function)


def test_linear_is_two_flops_a_weight_and_row():
    assert forward_flops(lambda: nn.Linear(30, 50)(torch.zeros(7, 30))) == 2 * 7 * 30 * 50


def test_convolution_is_two_flops_a_weight_and_output_pixel():
    def convolve() -> torch.Tensor:
        return nn.Conv2d(6, 8, kernel_size=3, padding=1, stride=2, groups=2)(torch.zeros(2, 6, 16, 16))

    # 16 -> 8 pixels a side; each output sees 3 x 3 pixels of 6 / 2 channels.
    assert forward_flops(convolve) == 2 * 2 * 8 * 8 * 8 * 3 * 3 * 3


ATTENTION_FLOPS = 2 * 2 * (2 * 3 * 5 * 7 * 16)  # queries x keys and weights x values; 2 samples, 3 heads


@pytest.mark.parametrize("mask", [None, "causal", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_counted_whichever_kernel_is_chosen(mask, dtype):
    def attend() -> torch.Tensor:
        queries_BHLC = torch.zeros(2, 3, 5, 16, dtype=dtype)
        keys_BHLC = torch.zeros(2, 3, 7, 16, dtype=dtype)
        attn_mask = torch.zeros(2, 1, 5, 7, dtype=dtype) if mask == "padding" else None
        return nn.functional.scaled_dot_product_attention(
            queries_BHLC, keys_BHLC, keys_BHLC, attn_mask=attn_mask, is_causal=mask == "causal"
        )

    assert count_flops(attend) == ATTENTION_FLOPS


def test_backward_counts_the_products_that_it_needs_and_no_recomputation():
    def train() -> None:
        layer = nn.Linear(30, 50)
        frozen = nn.Linear(50, 40).requires_grad_(False)
        frozen(layer(torch.zeros(7, 30)))

    of_layer, of_frozen = 2 * 7 * 30 * 50, 2 * 7 * 50 * 40
    assert count_flops(train) == 2 * of_layer + 2 * of_frozen, (
        "no gradient of the input, none of frozen weights"
    )

    def attend() -> None:
        queries, keys, values = (torch.zeros(2, 3, size, 16, requires_grad=True) for size in (5, 7, 7))
        nn.functional.scaled_dot_product_attention(queries, keys, values)

    assert count_flops(attend) == 3 * ATTENTION_FLOPS


def test_every_kind_of_product_counts_as_torch_counts_it():
    """Forward and backward, beside torch's own counter of what is really computed."""

    def train(device):
        def random(*shape):
            return torch.ones(*shape, device=device, requires_grad=True)

        left, right, batch = random(4, 5), random(5, 6), random(3, 4, 5)
        norm = nn.LayerNorm(5, device=device)
        convolution = nn.Conv1d(4, 2, 3, device=device)
        results = [
            left @ right,
            left.mm(right),
            left.matmul(right),
            torch.addmm(random(6), left, right),
            torch.matmul(batch, right),
            batch.bmm(random(3, 5, 2)),
            torch.baddbmm(random(3, 4, 2), batch, random(3, 5, 2)),
            nn.functional.linear(norm(torch.ones(7, 5, device=device)), weight=random(2, 5)),
            convolution(nn.functional.silu(batch)),
        ]
        return sum(result.sum() for result in results)

    with FlopCounterMode(display=False) as counter:
        train("cpu").backward()
    assert count_flops(lambda: train("meta")) == counter.get_total_flops()


def test_nothing_is_computed_and_a_copy_without_memory_leaves_the_module_as_it_is():
    layer = nn.BatchNorm1d(4)
    layer.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    copy = without_memory(layer)
    assert {tensor.device.type for tensor in copy.state_dict().values()} == {"meta"}
    assert [item.requires_grad for item in copy.parameters()] == [False, True]

    def train_on_it() -> None:
        copy(torch.zeros(10**7, 4))
        torch.zeros(10**7, 10**7)  # 364 TiB

    assert count_flops(train_on_it) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert type(layer.weight) is nn.Parameter


# The totals below were counted independently, before this module existed, on the published configurations.


def test_full_prior_is_164_6_gflop_at_81_tokens():
    from diffusers import PriorTransformer

    def forward(model: nn.Module) -> object:
        return model(
            torch.zeros(2, 1280),
            timestep=torch.zeros(2, dtype=torch.int64),
            proj_embedding=torch.zeros(2, 1280),
            encoder_hidden_states=torch.zeros(2, 77, 1280),
            attention_mask=torch.ones(2, 77, dtype=torch.bool),
        )

    flops = forward_flops(lambda: forward(PriorTransformer(**PRIOR_CONFIG))) / 2
    assert flops / 1e9 == pytest.approx(164.6, abs=0.05)


@pytest.mark.parametrize(("resolution", "gflops"), [(512, 856), (768, 1993)])
def test_full_unet_is_856_gflop_at_512_pixels_and_1993_at_768(resolution, gflops):
    from diffusers import UNet2DConditionModel

    def forward(model: nn.Module) -> object:
        return model(
            torch.zeros(1, 4, resolution // 8, resolution // 8),
            torch.zeros(1, dtype=torch.int64),
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": torch.zeros(1, 1280)},
        )

    flops = forward_flops(lambda: forward(UNet2DConditionModel(**UNET_CONFIG)))
    assert flops / 1e9 == pytest.approx(gflops, abs=0.5)
