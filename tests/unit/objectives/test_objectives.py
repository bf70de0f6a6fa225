"""Both objectives over real tiny networks, with a model that remembers what it was given."""

from dataclasses import replace

import pytest
import torch
from helpers.objective import Recorder, batch_at, configuration, loader_of, objective_of, padded

from kandinsky_dist.objectives.base import NUM_HELD_OUT_DRAWS, Draw, Prepared, roll_conditions
from kandinsky_dist.train import build


@pytest.fixture(scope="module", params=["prior", "decoder"])
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def objective(stage, tiny_models, small_corpus):
    settings = ["objective.snr_gamma=5"]
    settings += ["data.image_embedding_dropout=0.5"] if stage == "decoder" else ["data.caption_dropout=0.5"]
    return objective_of(configuration(stage, *settings, models=tiny_models, corpus=small_corpus))


@pytest.fixture(scope="module")
def batch(stage, tiny_models, small_corpus):
    loader = loader_of(configuration(stage, models=tiny_models, corpus=small_corpus))
    return batch_at(loader, [3, 40, 5, 77])


def test_what_is_diffused_is_fp32_and_of_the_published_scale(stage, objective, batch):
    prepared = objective.prepare(batch)
    assert prepared.clean.dtype == torch.float32
    assert not prepared.clean.requires_grad
    if stage == "prior":
        embeds_BD = objective.image_encoder(objective.normalisation(batch.clip_pixels_BCHW)).image_embeds
        torch.testing.assert_close(prepared.clean * objective.clip_std_D + objective.clip_mean_D, embeds_BD)
    else:
        pixels = batch.pixels_BCHW / 127.5 - 1
        unquantised = objective.movq.quant_conv(objective.movq.encoder(pixels))
        torch.testing.assert_close(prepared.clean, unquantised)


def test_a_samples_loss_does_not_depend_on_its_company(objective, batch):
    together_B = objective.losses(Recorder(), objective.prepare(batch))
    for row in range(4):
        alone = objective.prepare(
            replace(batch._map(lambda tensor, row=row: tensor[row : row + 1]), keys=[""])
        )
        torch.testing.assert_close(objective.losses(Recorder(), alone), together_B[row : row + 1])


def test_validation_has_neither_weights_nor_dropout(stage, objective, batch):
    prepared = objective.prepare(batch)
    recorder = Recorder()
    figures = objective.evaluate(recorder, prepared)
    half = 1 if stage == "prior" else NUM_HELD_OUT_DRAWS  # the prior's draws share a forward pass
    assert len(recorder.calls) == 2 * half
    for right, wrong in zip(recorder.calls[:half], recorder.calls[half:], strict=True):
        assert torch.equal(right.noised, wrong.noised)
        assert torch.equal(right.timesteps_B, wrong.timesteps_B)
    key = "proj_embedding" if stage == "prior" else "image_embeds"
    given = [
        call.conditions if stage == "prior" else call.conditions["added_cond_kwargs"]
        for call in (right, wrong)
    ]
    assert torch.equal(given[0][key], prepared.conditions[key])
    assert torch.equal(given[1][key], prepared.conditions[key].roll(1, 0))
    unweighted = replace(objective, snr_gamma=None)
    each = [
        unweighted.losses(Recorder(), prepared, draw=Draw(number, NUM_HELD_OUT_DRAWS))
        for number in range(NUM_HELD_OUT_DRAWS)
    ]
    torch.testing.assert_close(figures["loss"], torch.stack(each).mean(0))
    if stage == "prior":
        torch.testing.assert_close(figures["loss_mean_embedding"], figures["loss"])  # the recorder says 0


def test_rolled_conditions_leave_the_samples_alone():
    prepared = Prepared(
        torch.arange(3), torch.randn(3, 2), {"a": torch.arange(3), "b": torch.arange(6).view(3, 2)}
    )
    rolled = roll_conditions(prepared)
    assert torch.equal(rolled.clean, prepared.clean)
    assert torch.equal(rolled.positions_B, prepared.positions_B)
    assert rolled.conditions["a"].tolist() == [2, 0, 1]
    assert rolled.conditions["b"].tolist() == [[4, 5], [0, 1], [2, 3]]


def test_several_noise_draws_are_the_mean_of_as_many_losses(tiny_models, small_corpus):
    """The reference is diffusers' own forward on padded text, a draw at a time."""
    places = {"models": tiny_models, "corpus": small_corpus}
    config = configuration("prior", "objective.snr_gamma=5", "objective.noise_draws=3", **places)
    objective, folders = objective_of(config), build.Folders.of(config)
    batch = batch_at(loader_of(config), [3, 40, 5, 77])
    ours = build.model_plan(config, folders.source).build()
    ours.load_state_dict(folders.source.state_dict())
    losses_B = objective.losses(ours, objective.prepare(batch))
    losses_B.mean().backward()
    theirs = folders.source.build()
    theirs.load_state_dict(folders.source.state_dict())
    single = replace(objective, noise_draws=1, token_multiple=None)
    whole = single.prepare(padded(batch, 77))
    draws = [Draw(number, 3) for number in range(3)]
    expected_B = torch.stack([single.losses(theirs, whole, draw=draw) for draw in draws]).mean(0)
    expected_B.mean().backward()
    assert batch.text_length < whole.conditions["attention_mask"].shape[1] == 77
    torch.testing.assert_close(losses_B, expected_B)
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_computes_the_tokens_that_there_are_or_a_few_more_where_it_compiles(tiny_models, small_corpus):
    config = configuration("prior", models=tiny_models, corpus=small_corpus)
    objective, batch = objective_of(config), batch_at(loader_of(config), range(8))
    num_tokens = int(batch.token_mask_BL.sum())
    assert batch.num_text_tokens == objective.prepare(batch).num_text_tokens == num_tokens
    rounded = replace(objective, token_multiple=2).prepare(batch).num_text_tokens
    assert rounded % 16 == 0
    assert num_tokens <= rounded < num_tokens + 16
    full = replace(batch, num_text_tokens=8 * batch.text_length - 1)
    assert replace(objective, token_multiple=3).num_computed_tokens(full) == 8 * batch.text_length


def test_what_is_prepared_of_a_cut_text_is_the_beginning_of_the_whole(tiny_models, small_corpus):
    """The text encoder is causal, and pools at each caption's first end token."""
    config = configuration("prior", models=tiny_models, corpus=small_corpus)
    objective, batch = objective_of(config), batch_at(loader_of(config), range(8))
    cut, whole = objective.prepare(batch).conditions, objective.prepare(padded(batch, 77)).conditions
    length = batch.text_length
    assert length % 8 == 0
    assert length - 8 < int(batch.token_mask_BL.sum(1).max()) <= length < 77
    assert torch.equal(whole["attention_mask"][:, :length], cut["attention_mask"])
    assert not whole["attention_mask"][:, length:].any()
    torch.testing.assert_close(cut["proj_embedding"], whole["proj_embedding"])
    torch.testing.assert_close(cut["encoder_hidden_states"], whole["encoder_hidden_states"][:, :length])
