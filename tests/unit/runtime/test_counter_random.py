"""runtime.hashing and runtime.rng: the same draws on CPU and device, and draws that deserve the name."""

import math

import numpy as np
import pytest
import torch
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kandinsky_dist.runtime import hashing, rng
from kandinsky_dist.runtime.hashing import Stream

SEED = 1234
NUM_DRAWS = 200_000
# Draws are fixed by the seed, so these bounds cannot flake: four standard deviations of the figure that they
# bound, and for Kolmogorov-Smirnov the asymptotic 0.1% point of sqrt(n) D.
FOUR_SIGMA = 4.0
KS_BOUND = 1.95

seeds = st.integers(-(2**63), 2**64 - 1)
streams = st.sampled_from(list(Stream))
positions = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)


def normal_cdf(values: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-values.double() / math.sqrt(2.0))


def ks_statistic(cdf_values: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical and the claimed distribution."""
    ordered = cdf_values.double().flatten().sort().values
    n = ordered.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return math.sqrt(n) * distance.item()


def correlation(left: Tensor, right: Tensor) -> float:
    return torch.corrcoef(torch.stack([left.flatten().double(), right.flatten().double()]))[0, 1].item()


@given(seed=seeds, stream=streams, counters=positions)
def test_numpy_and_torch_agree_bit_for_bit(seed, stream, counters):
    on_host = hashing.hash_counters(seed, stream, counters)
    on_device = rng.hash_counters(seed, stream, torch.tensor(counters, dtype=torch.int64))
    assert on_host.dtype == np.uint64
    assert on_device.numpy().view(np.uint64).tolist() == on_host.tolist()


@given(seed=seeds, stream=streams, counters=positions)
def test_uniform_is_the_same_number_on_both_sides_and_below_one(seed, stream, counters):
    on_host = hashing.uniform(seed, stream, counters)
    on_device = rng.uniform(seed, stream, torch.tensor(counters, dtype=torch.int64))
    assert on_device.dtype == torch.float32
    assert on_device.double().tolist() == on_host.tolist()
    assert all(0.0 <= value < 1.0 for value in on_host)


def test_uniform_has_a_largest_value_below_one_in_fp32():
    largest = (2**24 - 1) * 2.0**-24
    assert np.float32(largest) < 1.0


def test_hash_of_a_known_counter_never_changes():
    """A run that is resumed by a later version must meet the same data order and noise."""
    assert hashing.hash_counters(0, Stream.NOISE, [0, 1]).tolist() == [
        0x97099C48ED5B0DBE,
        0x258B45C71536602F,
    ]
    assert {stream.name: int(stream) for stream in Stream}.items() >= {
        "CHUNK_ORDER": 1,
        "WINDOW_ORDER": 2,
        "CAPTION_DROPOUT": 3,
        "IMAGE_DROPOUT": 4,
        "TIMESTEP": 5,
        "NOISE": 6,
    }.items()


def test_mix_is_a_bijection_with_an_inverse():
    words = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    assert len(np.unique(hashing.mix(words))) == len(np.unique(words))


def test_every_input_bit_moves_every_output_bit():
    words = np.random.default_rng(1).integers(0, 2**64, 4096, dtype=np.uint64)
    for bit in range(64):
        changed = hashing.mix(words) ^ hashing.mix(words ^ np.uint64(1 << bit))
        share = np.unpackbits(changed.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert (abs(share - 0.5) < 0.06).all(), (bit, share.min(), share.max())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_hashes_keep_the_shape_of_the_counters(shape):
    counters = np.arange(math.prod(shape)).reshape(shape)
    expected = hashing.hash_counters(SEED, Stream.TIMESTEP, counters)
    found = rng.hash_counters(SEED, Stream.TIMESTEP, torch.from_numpy(counters))
    assert expected.shape == shape == tuple(found.shape)
    assert np.array_equal(found.numpy().view(np.uint64), expected)


def test_uniforms_are_uniform():
    values = rng.uniform(SEED, Stream.CAPTION_DROPOUT, torch.arange(NUM_DRAWS))
    assert ks_statistic(values) < KS_BOUND
    dropped = (values < 0.1).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=FOUR_SIGMA * math.sqrt(0.1 * 0.9 / NUM_DRAWS))


@pytest.mark.parametrize("high", [1, 2, 1000, 2**24])
def test_integers_stay_below_high(high):
    values = rng.integers(SEED, Stream.TIMESTEP, torch.arange(NUM_DRAWS), high)
    assert values.dtype == torch.int64
    assert 0 <= values.min().item() <= values.max().item() < high


@pytest.mark.parametrize("high", [2, 7, 1000])
def test_integers_are_uniform(high):
    counts = torch.bincount(
        rng.integers(SEED, Stream.TIMESTEP, torch.arange(NUM_DRAWS), high), minlength=high
    )
    expected = NUM_DRAWS / high
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    # chi-squared has mean k and variance 2 k for k = high - 1 degrees of freedom
    assert chi_squared < (high - 1) + FOUR_SIGMA * math.sqrt(2 * (high - 1)) + FOUR_SIGMA, chi_squared


@pytest.mark.parametrize("axis", ["one position", "one element of each position"])
def test_normals_have_the_moments_and_distribution_of_a_normal(axis):
    if axis == "one position":
        values = rng.normal(SEED, Stream.NOISE, torch.tensor([5]), (NUM_DRAWS,))
    else:
        values = rng.normal(SEED, Stream.NOISE, torch.arange(NUM_DRAWS), (1,))
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    values = values.double().flatten()
    for power, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        found = (values**power).mean().item()
        assert found == pytest.approx(moment, abs=FOUR_SIGMA * math.sqrt(variance / NUM_DRAWS)), power
    assert ks_statistic(normal_cdf(values)) < KS_BOUND


def test_kolmogorov_smirnov_notices_a_spread_that_is_off_by_one_percent():
    values = rng.normal(SEED, Stream.NOISE, torch.tensor([5]), (NUM_DRAWS,))
    assert ks_statistic(normal_cdf(values * 1.02)) > KS_BOUND


def noise(seed: int = SEED, stream: Stream = Stream.NOISE, first: int = 0, num_elements: int = 500) -> Tensor:
    return rng.normal(seed, stream, torch.arange(first, first + 400), (num_elements,))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (noise(), noise(seed=SEED + 1)),
        (noise(), noise(seed=SEED ^ (1 << 40))),
        (noise(), noise(stream=Stream.TIMESTEP)),
        (noise(), noise(first=1)),
        (noise(), noise(first=400)),
        (noise()[:, :-1], noise()[:, 1:]),
        (noise()[:, :250], noise()[:, 250:]),
        (noise()[:, :250] ** 2, noise()[:, 250:] ** 2),
    ],
    ids=[
        "next seed",
        "seed with one bit changed",
        "another stream",
        "next position",
        "next batch",
        "neighbouring elements",
        "two normals of one pair",
        "squares of two normals of one pair",
    ],
)
def test_draws_that_should_be_independent_are_uncorrelated(left, right):
    found = correlation(left, right)
    assert abs(found) < FOUR_SIGMA / math.sqrt(left.numel()), found
    assert not torch.isin(left[:4].flatten(), right[:4].flatten()).all()


@given(shift=st.integers(0, 2**40), order=st.permutations(range(6)), split=st.integers(1, 5))
@examples(30)
def test_noise_of_a_sample_does_not_depend_on_its_batch(shift, order, split):
    positions_B = torch.arange(6) + shift
    whole = rng.normal(SEED, Stream.NOISE, positions_B, (4, 3, 3))
    shuffled = rng.normal(SEED, Stream.NOISE, positions_B[list(order)], (4, 3, 3))
    parts = [rng.normal(SEED, Stream.NOISE, part, (4, 3, 3)) for part in positions_B.split(split)]
    assert torch.equal(shuffled, whole[list(order)])
    assert torch.equal(torch.cat(parts), whole)
    for draw in (rng.uniform, lambda *key: rng.integers(*key, high=1000)):
        one_by_one = torch.cat([draw(SEED, Stream.TIMESTEP, one) for one in positions_B.split(1)])
        assert torch.equal(draw(SEED, Stream.TIMESTEP, positions_B), one_by_one)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 1, 3), (2, 0)])
@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_noise_has_the_shape_that_was_asked_for(shape, num_samples):
    values = rng.normal(SEED, Stream.NOISE, torch.arange(num_samples), shape)
    assert tuple(values.shape) == (num_samples, *shape)
    assert values.unique().numel() == values.numel(), "no number twice"


def test_latents_of_a_sample_share_no_element_with_each_other():
    values = rng.normal(SEED, Stream.NOISE, torch.arange(8), (4, 32, 32)).reshape(8, -1)
    gram = values @ values.T / values.shape[1]
    off_diagonal = gram - torch.diag(gram.diagonal())
    assert off_diagonal.abs().max().item() < FOUR_SIGMA * 1.2 / math.sqrt(values.shape[1]), gram


def test_largest_normal_is_that_of_32_bits():
    """The smallest radius bits give sqrt(2 ln 2^32) = 6.66; nothing larger, nothing infinite."""
    assert math.sqrt(-2.0 * math.log(2.0**-32)) == pytest.approx(6.66, abs=0.01)
    values = rng.normal(SEED, Stream.NOISE, torch.arange(64), (4, 32, 32))
    assert 4.0 < values.abs().max().item() < 6.67
