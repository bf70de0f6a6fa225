"""The pad-free forward against diffusers' own: outputs and gradients of every parameter."""

import copy
from itertools import product

import pytest
import torch
from diffusers import PriorTransformer
from helpers.campaign import cases, pairwise
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.blocks import enable_gradient_checkpointing
from kandinsky_dist.models.load import freeze_statistics
from kandinsky_dist.models.prior import make_pad_free

WIDTH, NUM_LAYERS = 24, 3
LENGTHS = [[77, 2, 30], [2, 2, 2], [77, 77, 77], [16, 16, 16], [5, 9, 24], [1, 8, 3]]
# Lengths, draws, padding, whether blocks are recomputed.
PACKED = list(product(LENGTHS, [None, 1, 3], [0, 1, 7], [False, True]))
SHARED = list(product(LENGTHS[:5], [1, 2, 5], [False, True]))


def networks(**settings):
    """diffusers' network with weights in which no term is negligible, and a copy with our forward; fp64."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": NUM_LAYERS}
    plain = PriorTransformer(embedding_dim=WIDTH, **shape, **settings).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.2)
    freeze_statistics(plain)
    ours = copy.deepcopy(plain)
    make_pad_free(ours)
    return plain, ours


def inputs(lengths, num_draws=None, dtype=torch.float64):
    """Keyword arguments for padded text, and a direction for the gradient."""
    generator = torch.Generator().manual_seed(sum(lengths))
    num_samples = len(lengths)
    draws = (num_samples,) if num_draws is None else (num_samples, num_draws)

    def normal(*shape):
        return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    arguments = {
        "hidden_states": normal(*draws),
        "timestep": torch.randint(0, 1000, draws, generator=generator),
        "proj_embedding": normal(num_samples),
        "encoder_hidden_states": normal(num_samples, 77),
        "attention_mask": torch.arange(77) < torch.tensor(lengths)[:, None],
    }
    return arguments, normal(*draws)


def cut(arguments, length):
    texts = ("encoder_hidden_states", "attention_mask")
    return {name: value[:, :length] if name in texts else value for name, value in arguments.items()}


def packed(arguments, num_padding=0):
    """Text cut to its longest, and computed without its padding, or with some of it."""
    num_tokens = arguments["attention_mask"].sum().item()
    length = arguments["attention_mask"].sum(1).max().item()
    return cut(arguments, length) | {"num_text_tokens": num_tokens + num_padding}


def draw(arguments, number):
    noised = ("hidden_states", "timestep")
    return {name: value[:, number] if name in noised else value for name, value in arguments.items()}


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def compare(ours, plain, found, expected, tolerance=1e-10):
    """Outputs, then gradients; an absent one must be absent in both."""
    difference = (found - expected).abs().max().item()
    theirs = gradients(plain)
    for name, gradient in gradients(ours).items():
        if gradient is None or theirs[name] is None:
            assert gradient is theirs[name], name
        else:
            difference = max(difference, (gradient - theirs[name]).abs().max().item())
    print(f"largest difference {difference:.1e}")
    assert difference < tolerance


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_outputs_and_gradients_are_diffusers(lengths, is_recomputed):
    plain, ours = networks()
    if is_recomputed:
        enable_gradient_checkpointing(ours)
    arguments, direction = inputs(lengths)
    expected = plain(**arguments).predicted_image_embedding
    (expected * direction).sum().backward()
    for length in {max(lengths), min(77, max(lengths) + 5), 77}:
        found = ours(**cut(arguments, length)).predicted_image_embedding
        (found * direction).sum().backward()
        assert found.shape == expected.shape
        compare(ours, plain, found, expected)
        (plain(**arguments).predicted_image_embedding * direction).sum().backward()


@pytest.mark.parametrize(
    ("lengths", "num_draws", "num_padding", "is_recomputed"), cases(PACKED, pairwise(PACKED).__contains__)
)
def test_packed_tokens_give_what_diffusers_gives(lengths, num_draws, num_padding, is_recomputed):
    plain, ours = networks()
    if is_recomputed:
        enable_gradient_checkpointing(ours)
    arguments, target = inputs(lengths, num_draws)
    if num_draws is None:
        expected = plain(**arguments).predicted_image_embedding
    else:
        each = [plain(**draw(arguments, number)).predicted_image_embedding for number in range(num_draws)]
        expected = torch.stack(each, dim=1)
    (expected - target).square().mean().backward()
    found = ours(**packed(arguments, num_padding)).predicted_image_embedding
    (found - target).square().mean().backward()
    assert found.shape == expected.shape
    compare(ours, plain, found, expected)


def test_packed_rows_are_those_of_the_text_and_what_is_behind_it():
    _, ours = networks()
    rows = []
    for block in ours.transformer_blocks:
        block.ff.register_forward_hook(lambda _module, given, _output: rows.append(len(given[0])))
    arguments, _ = inputs([5, 9, 24], num_draws=2)
    ours(**packed(arguments))
    ours(**packed(arguments, num_padding=3))
    of_all = 5 + 9 + 24 + 3 * (1 + 3 * 2)
    assert rows == [of_all, of_all, 3 * 2, of_all + 3, of_all + 3, 3 * 2]


@pytest.mark.parametrize(
    ("lengths", "num_draws", "is_recomputed"), cases(SHARED, pairwise(SHARED).__contains__)
)
def test_draws_that_share_a_text_are_as_many_forwards(lengths, num_draws, is_recomputed):
    plain, ours = networks()
    if is_recomputed:
        enable_gradient_checkpointing(ours)
    arguments, target = inputs(lengths, num_draws)
    each = [plain(**draw(arguments, number)).predicted_image_embedding for number in range(num_draws)]
    expected = torch.stack(each, dim=1)
    (expected - target).square().mean().backward()
    found = ours(**cut(arguments, max(lengths))).predicted_image_embedding
    (found - target).square().mean().backward()
    compare(ours, plain, found, expected)


def test_optional_norms_are_applied():
    plain, ours = networks(norm_in_type="layer", embedding_proj_norm_type="layer")
    arguments, direction = inputs([4, 11])
    expected = plain(**arguments).predicted_image_embedding
    (expected * direction).sum().backward()
    found = ours(**cut(arguments, 11)).predicted_image_embedding
    (found * direction).sum().backward()
    compare(ours, plain, found, expected)


@pytest.mark.parametrize("is_autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_differs_from_the_exact_result_by_rounding_as_diffusers_does(is_autocast):
    """Rounding to 8 bits is off by up to 2**-8 of the value, each time independently.

    A layer rounds about ten times on its way: two norms, query, key, value, attention, three of the
    feed-forward, and both sums. The errors add up as independent ones do.
    """
    plain, ours = networks()
    lengths = [3 + number % 22 for number in range(64)]
    arguments, _ = inputs(lengths)
    with torch.no_grad():
        exact = plain(**arguments).predicted_image_embedding
        if is_autocast:
            plain, ours, dtype = plain.float(), ours.float(), torch.float32
        else:
            plain, ours, dtype = plain.bfloat16(), ours.bfloat16(), torch.bfloat16
        arguments, _ = inputs(lengths, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            theirs = plain(**arguments).predicted_image_embedding
            found = ours(**packed(arguments)).predicted_image_embedding
    assert found.dtype == theirs.dtype == torch.bfloat16

    def error(values):
        return ((values.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    bound = 2**-8 * (10 * NUM_LAYERS + 5) ** 0.5
    print(f"ours {error(found):.1e}, diffusers' {error(theirs):.1e}, bound {bound:.1e}")
    assert 0 < error(found) < bound
    # Two root mean squares over 64 independent samples: each is off by 1/sqrt(128) of itself, four times that
    # for both is a half.
    assert error(found) < 1.5 * error(theirs)


def test_one_draw_needs_no_mask_but_in_the_last_layer():
    """Flash attention takes none."""
    _, ours = networks()
    arguments, _ = inputs([5, 9, 24])
    given = []
    for block in ours.transformer_blocks:
        block.register_forward_pre_hook(lambda _block, positional: given.append(positional[3]))
    for texts in (cut(arguments, 24), packed(arguments)):
        given.clear()
        ours(**texts)
        assert given[:-1] == [None] * (NUM_LAYERS - 1)
        assert given[-1].shape == (3, 1, 28)


@pytest.mark.parametrize("lengths", [[5], [5, 9]], ids=str)
def test_gradients_arrive_laid_out_as_their_weights(lengths):
    """DDP's buckets want that, and torch warns of every other layout."""
    _, ours = networks()
    found = []
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            weight.register_hook(
                lambda gradient, name=name, weight=weight: found.append(
                    (name, gradient.stride() == weight.stride())
                )
            )
    arguments, _ = inputs(lengths)
    ours(**cut(arguments, max(lengths))).predicted_image_embedding.sum().backward()
    assert len(found) > 10
    assert [name for name, is_alike in found if not is_alike] == []


def test_the_last_layer_computes_what_is_read():
    _, ours = networks()
    rows = {}
    for name in ("transformer_blocks.1.ff", "transformer_blocks.2.ff", "transformer_blocks.2.attn1.to_q"):
        ours.get_submodule(name).register_forward_hook(
            lambda _module, given, _output, name=name: rows.__setitem__(name, len(given[0]))
        )
    arguments, _ = inputs([5, 9], num_draws=4)
    ours(**cut(arguments, 16))
    assert list(rows.values()) == [2 * (16 + 1 + 3 * 4), 2 * 4, 2 * 4]


def test_every_attention_kernel_gives_the_same():
    _, ours = networks()
    arguments, _ = inputs([5, 9, 24], num_draws=2)
    found = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            found.append(ours(**packed(arguments)).predicted_image_embedding)
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)


def test_names_stay_and_another_kind_of_prior_is_refused():
    plain, ours = networks()
    assert list(ours.state_dict()) == list(plain.state_dict())
    with pytest.raises(ConfigError, match="added_emb_type=None"):
        make_pad_free(PriorTransformer(2, 8, 1, WIDTH, added_emb_type=None, additional_embeddings=3))
