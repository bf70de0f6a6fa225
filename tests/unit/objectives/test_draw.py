"""Held-out draws: the first is the training draw, and together they cover the diffusion evenly."""

import torch

from kandinsky_dist.objectives.base import TRAINING_DRAW, Draw
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream

POSITIONS_B = torch.arange(1000)


def test_training_draws_by_position_alone():
    assert torch.equal(
        TRAINING_DRAW.timesteps(3, POSITIONS_B, 1000), rng.integers(3, Stream.TIMESTEP, POSITIONS_B, 1000)
    )
    assert torch.equal(
        TRAINING_DRAW.noise(3, POSITIONS_B, (4,)), rng.normal(3, Stream.NOISE, POSITIONS_B, (4,))
    )


def test_split_draws_are_those_of_so_many_and_a_split_in_one_is_itself():
    assert TRAINING_DRAW.split(1) == [TRAINING_DRAW]
    assert TRAINING_DRAW.split(4) == [Draw(number, 4) for number in range(4)]
    assert [part for half in TRAINING_DRAW.split(2) for part in half.split(3)] == TRAINING_DRAW.split(6)


def test_each_of_several_draws_has_a_uniform_timestep():
    """So their mean loss estimates what a single draw's does."""
    for draw in TRAINING_DRAW.split(8):
        counts_10 = (draw.timesteps(3, torch.arange(100_000), 1000) // 100).bincount(minlength=10)
        # Five standard deviations of a binomial count around its mean.
        assert (counts_10 - 10_000).abs().max() < 5 * (100_000 * 0.1 * 0.9) ** 0.5, draw


def test_a_samples_draws_are_a_quarter_of_the_diffusion_apart_and_their_noise_is_independent():
    draws = [Draw(number, 4) for number in range(4)]
    timesteps_4B = torch.stack([draw.timesteps(3, POSITIONS_B, 1000) for draw in draws])
    assert torch.equal(timesteps_4B.sort(0).values.diff(dim=0), torch.full((3, 1000), 250))
    noise_4E = torch.stack([draw.noise(3, POSITIONS_B, (16,)).flatten() for draw in draws])
    assert (torch.corrcoef(noise_4E) - torch.eye(4)).abs().max() < 0.03
