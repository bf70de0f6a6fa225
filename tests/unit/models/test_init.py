"""Random folders: whole or not at all, seeded, with statistics that normalise."""

import json
import os
import stat

import pytest
import torch

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models import init
from kandinsky_dist.models.architectures import architecture
from kandinsky_dist.models.drawings import draw_pictures
from kandinsky_dist.models.frozen import (
    clip_preprocessing,
    load_image_encoder,
    load_movq,
    load_text_encoder,
)
from kandinsky_dist.models.init import initialise
from kandinsky_dist.models.load import ModelSource
from kandinsky_dist.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def embed(folder, pictures_BCHW):
    facts = clip_preprocessing(folder)
    mean, std = torch.tensor(facts.mean).view(3, 1, 1), torch.tensor(facts.std).view(3, 1, 1)
    with torch.no_grad():
        encoder = load_image_encoder(folder, torch.float32, CPU)
        return encoder((pictures_BCHW.float() / 255 - mean) / std).image_embeds


def effective_rank(embeddings_BD):
    normalised_BD = (embeddings_BD - embeddings_BD.mean(0)) / embeddings_BD.std(0)
    values_D = torch.linalg.eigvalsh(torch.cov(normalised_BD.T).double())
    return float(values_D.sum() ** 2 / values_D.square().sum())


def test_statistics_normalise_drawn_pictures_and_hold_for_new_ones(prior_folder):
    weights = ModelSource(prior_folder, "prior").state_dict()
    mean_D, std_D = weights["clip_mean"][0], weights["clip_std"][0]
    embeddings_BD = embed(prior_folder, draw_pictures(256, 64, seed=0))
    torch.testing.assert_close(mean_D, embeddings_BD.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std_D, embeddings_BD.std(0), atol=1e-4, rtol=1e-4)
    new_BD = (embed(prior_folder, draw_pictures(256, 64, seed=1)) - mean_D) / std_D
    assert new_BD.mean(0).abs().max() < 0.5
    assert 0.7 < new_BD.std(0).mean() < 1.3


def test_embeddings_tell_pictures_apart(prior_folder):
    embeddings_BD = embed(prior_folder, draw_pictures(256, 64, seed=2))
    cosine = torch.nn.functional.cosine_similarity(embeddings_BD[:128], embeddings_BD[128:]).mean()
    print(f"effective rank {effective_rank(embeddings_BD):.1f}, cosine {cosine:.2f}")
    assert effective_rank(embeddings_BD) > 10, "as transformers initialises it is 4"
    assert cosine < 0.75, "as transformers initialises it is 0.99"


def test_text_states_tell_captions_apart(prior_folder):
    words = ["cat", "dog", "car", "tree", "house", "apple", "boat", "train", "rocket", "flower", "guitar"]
    captions = [f"a {color} {word}" for word in words for color in ("red", "green", "blue", "black")]
    tokens_BL, mask_BL = load_tokenizer(prior_folder)(captions)
    assert set(mask_BL.sum(1).tolist()) == {5}, "every word here is one token"
    with torch.no_grad():
        output = load_text_encoder(prior_folder, torch.float32, CPU)(input_ids=tokens_BL)
    for name, states_BD in {
        "pooled": output.text_embeds,
        "at the noun": output.last_hidden_state[:, 3],
    }.items():
        spread = states_BD.std(0).mean() / states_BD.square().mean().sqrt()
        print(f"{name}: spread {spread:.2f}, effective rank {effective_rank(states_BD):.1f}")
        assert spread > 0.3, "as transformers initialises the pooled state it is 0.19"
        assert effective_rank(states_BD) > 4


def test_latents_are_centred_uncorrelated_and_an_eighth_of_the_side(decoder_folder):
    pixels_BCHW = draw_pictures(64, 64, seed=3).float() / 127.5 - 1
    with torch.no_grad():
        latents_BCHW = load_movq(decoder_folder, torch.float32, CPU).encode(pixels_BCHW).latents
    assert latents_BCHW.shape == (64, 4, 8, 8)
    correlation = torch.corrcoef(latents_BCHW.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.3
    assert latents_BCHW.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents_BCHW.std((0, 2, 3)) - init.LATENT_STD).abs().max() < 0.1


def test_weights_depend_on_the_seed_alone_and_not_on_the_callers_generator(
    tmp_path, prior_folder, other_models
):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    initialise("tiny", tmp_path / "same", tokenizer=str(prior_folder))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (
        ModelSource(folder, "prior").state_dict()
        for folder in (prior_folder, tmp_path / "same" / "prior", other_models / "prior")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["proj_in.weight"], other["proj_in.weight"])


def test_statistics_are_those_of_the_pictures_given(tmp_path, prior_folder):
    pictures_BCHW = draw_pictures(32, 80, seed=4)
    initialise("tiny", tmp_path / "m", tokenizer=str(prior_folder), images=iter(pictures_BCHW.split(16)))
    drawn = ModelSource(prior_folder, "prior").state_dict()["clip_mean"]
    given = ModelSource(tmp_path / "m" / "prior", "prior").state_dict()["clip_mean"]
    assert (drawn - given).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"images=1 .*at least 2"):
        initialise("tiny", tmp_path / "n", tokenizer=str(prior_folder), images=[pictures_BCHW[:1]])
    assert not (tmp_path / "n").exists()


def test_a_complete_folder_is_kept_and_another_is_refused(tmp_path, tiny_models):
    weights = tiny_models / "prior" / "prior" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert initialise("tiny", tiny_models) is False
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"seed 0 \(asked for: 1\)"):
        initialise("tiny", tiny_models, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by this command"):
        initialise("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="known sizes: tiny, small, full"):
        initialise("big", tmp_path / "x")


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="--tokenizer="):
        initialise("tiny", tmp_path / "m", tokenizer=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_umask_allows(tiny_models):
    umask = os.umask(0)
    os.umask(umask)
    for path in tiny_models.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_configurations_written_are_those_of_the_table(tiny_models):
    shapes = architecture("tiny")
    for path, settings in {
        "prior/prior": shapes.prior,
        "prior/text_encoder": shapes.text_encoder,
        "decoder/unet": shapes.unet,
        "decoder/movq": shapes.movq,
    }.items():
        written = json.loads((tiny_models / path / "config.json").read_text())
        assert settings.items() <= written.items(), path


def test_drawings_differ_within_a_seed_and_repeat_with_it():
    first, again = draw_pictures(8, 32, seed=5), draw_pictures(8, 32, seed=5)
    assert torch.equal(first, again)
    assert len({picture.numpy().tobytes() for picture in first}) == 8
    assert not torch.equal(first, draw_pictures(8, 32, seed=6))
