"""Blocks, recomputation in backward and attention kernels."""

import importlib.util

import pytest
import torch

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.blocks import (
    SDPA_KERNELS,
    blocks,
    check_attention,
    enable_gradient_checkpointing,
    set_attention,
)
from kandinsky_dist.models.load import ModelSource, freeze_statistics


def prior_loss(model):
    generator = torch.Generator().manual_seed(1)
    prediction = model(
        torch.randn(2, 64, generator=generator),
        torch.tensor([3, 900]),
        torch.randn(2, 64, generator=generator),
        torch.randn(2, 77, 64, generator=generator),
        torch.arange(77)[None] < torch.tensor([[5], [20]]),
    ).predicted_image_embedding
    return prediction.square().mean()


def unet_loss(model):
    generator = torch.Generator().manual_seed(1)
    embeds = {"image_embeds": torch.randn(2, 64, generator=generator)}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return model(latents, torch.tensor([3, 900]), None, added_cond_kwargs=embeds).sample.square().mean()


@pytest.fixture(params=["prior", "unet"])
def network(request, prior_folder, decoder_folder):
    """(build, loss, a layer that runs once a forward)."""
    folder = prior_folder if request.param == "prior" else decoder_folder
    source = ModelSource(folder, request.param)

    def build():
        model = source.build()
        model.load_state_dict(source.state_dict())
        freeze_statistics(model)
        return model

    loss = prior_loss if request.param == "prior" else unet_loss
    inner = "transformer_blocks.2.norm3" if request.param == "prior" else "mid_block.attentions.0.to_q"
    return build, loss, inner


def gradients_and_calls(model, loss, inner):
    calls = []
    model.get_submodule(inner).register_forward_hook(lambda *_: calls.append(1))
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)


def test_checkpointing_recomputes_and_leaves_gradients_and_names_alone(network):
    build, loss, inner = network
    plain, num_calls = gradients_and_calls(build(), loss, inner)
    assert num_calls == 1
    model = build()
    enable_gradient_checkpointing(model)
    enable_gradient_checkpointing(model)
    recomputed, num_calls = gradients_and_calls(model, loss, inner)
    assert num_calls == 2, "once in forward, once in backward"
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert recomputed[name] is None, name
        else:
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_checkpointing_keeps_fewer_bytes_for_backward(network):
    build, loss, _ = network

    def kept_bytes(model):
        kept = {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = (tensor, tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(model)
        return sum(size for _, size in kept.values())

    model = build()
    plain = kept_bytes(model)
    enable_gradient_checkpointing(model)
    recomputed = kept_bytes(model)
    print(f"kept for backward: {plain:,} -> {recomputed:,} bytes")
    assert recomputed < 0.5 * plain


def test_no_recomputation_without_gradients(network):
    build, loss, inner = network
    model = build()
    enable_gradient_checkpointing(model)
    calls = []
    model.get_submodule(inner).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loss(model)
    assert len(calls) == 1


def test_blocks_hold_nearly_all_parameters_once_and_run_in_order(network):
    build, loss, _ = network
    model = build()
    units = blocks(model)
    owned = [parameter for unit in units for parameter in unit.parameters()]
    assert len({id(parameter) for parameter in owned}) == len(owned)
    share = sum(p.numel() for p in owned) / sum(p.numel() for p in model.parameters())
    print(f"{len(units)} blocks hold {share:.0%} of the parameters")
    assert share > 0.8
    order = []
    for index, unit in enumerate(units):
        unit.register_forward_hook(lambda *_, index=index: order.append(index))
    loss(model)
    assert order == list(range(len(units)))


def test_sdpa_is_the_default_and_xformers_asks_for_what_it_needs(network):
    build, _, _ = network
    model = build()
    before = {name: type(processor) for name, processor in model.attn_processors.items()}
    set_attention(model, "sdpa")
    assert {name: type(processor) for name, processor in model.attn_processors.items()} == before
    assert all(kind.__name__.endswith("2_0") for kind in before.values()), set(before.values())
    if torch.cuda.is_available():
        return
    missing = importlib.util.find_spec("xformers") is None
    with pytest.raises(ConfigError, match=r"kandinsky-dist\[xformers\]" if missing else "needs a CUDA GPU"):
        set_attention(model, "xformers")


def test_a_chosen_kernel_is_the_one_that_runs_and_only_where_it_is_chosen(network):
    build, loss, inner = network
    plain, _ = gradients_and_calls(build(), loss, inner)
    model = build()
    set_attention(model, "flash")
    enable_gradient_checkpointing(model)  # what is recomputed takes the same kernel
    with torch.profiler.profile() as profile:
        found, _ = gradients_and_calls(model, loss, inner)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    unavailable = build()
    set_attention(unavailable, "cudnn")
    with pytest.raises(RuntimeError):
        loss(unavailable)
    loss(build())  # nothing is left behind


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_kernel_that_is_not_there_is_refused_in_a_line():
    cpu = torch.device("cpu")
    for is_masked in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            check_attention("sdpa", cpu, dtype, is_masked=is_masked)
            check_attention("flash", cpu, dtype, is_masked=is_masked)
            for attention in set(SDPA_KERNELS) - {"flash"}:
                with pytest.raises(
                    ConfigError, match=f"parallel.attention={attention} has no kernel here"
                ) as it:
                    check_attention(attention, cpu, dtype, is_masked=is_masked)
                assert ("the prior needs" in str(it.value)) == is_masked
