"""`bench draws` on a small corpus: its figures are what they say they are."""

import pytest
import torch

from kandinsky_dist.bench import draws
from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.record import Record
from kandinsky_dist.cli import main
from kandinsky_dist.errors import ConfigError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def record(tiny_models, small_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("draws")
    places = ["--shards", str(small_corpus / "train"), "--models", str(tiny_models)]
    assert main(["bench", "draws", str(out), *places, "--steps", "0", "20", "--captions", "16"]) == 0
    page = (out / "draws.md").read_text()
    assert page == to_markdown(out / "draws.json")
    assert str(small_corpus) not in page
    return Record.load(out / "draws.json")


def test_more_draws_leave_less_variance_but_not_less_than_the_captions_have(record):
    assert [(row["num_steps"], row["noise_draws"]) for row in record.rows] == [
        (stage, number) for stage in (0, 20) for number in draws.NOISE_DRAWS
    ]
    for one, *_, eight in (record.rows[:4], record.rows[4:]):
        assert 0 < one["shared_variance"] < one["variance"]
        assert eight["variance"] < one["variance"]
        # 16 captions: far from exact, but not far beyond the floor either.
        assert eight["variance"] > 0.8 * one["shared_variance"]


def test_the_network_is_trained_between_the_stages(record):
    before, after = record.rows[0], record.rows[4]
    assert after["loss"] < 0.9 * before["loss"]
    assert after["squared_mean"] < before["squared_mean"]


def test_flops_of_draws_are_those_of_three_tokens_each(record):
    """In all layers but the last, of which only the read tokens cost more than their keys and values."""
    flops = [row["full_cached_flops"] for row in record.rows[:4]]
    per_draw = [(later - flops[0]) / (number - 1) for later, number in zip(flops[1:], (2, 4, 8), strict=True)]
    # Attention aside, which is quadratic in the length and small.
    assert per_draw == pytest.approx([per_draw[0]] * 3, rel=0.02)
    assert 3 / (24 + 4) < per_draw[0] / flops[0] < 3.5 / (24 + 4)
    (encoders,) = {row["full_live_flops"] - row["full_cached_flops"] for row in record.rows}
    assert encoders > 3 * flops[0]


def test_moments_are_those_of_the_gradients():
    generator = torch.Generator().manual_seed(0)
    shared_NP, one_NP, two_NP = torch.randn(3, 400, 30, generator=generator, dtype=torch.float64)
    first_NP, second_NP = 0.5 + 2 * shared_NP + one_NP, 0.5 + 2 * shared_NP + two_NP
    moments = sum(
        (
            draws._Moments(1, 0.0, float(mine @ mine), float(mine @ other), mine)
            for mine, other in zip(first_NP, second_NP, strict=True)
        ),
        draws._Moments(),
    )
    assert moments.variance == pytest.approx(float(first_NP.var(0).sum()))
    assert moments.variance == pytest.approx(30 * 5, rel=0.1)
    assert moments.shared_variance == pytest.approx(30 * 4, rel=0.1)
    assert moments.squared_mean == pytest.approx(30 * 0.25, rel=0.3)


def test_too_few_captions_have_no_spread(tmp_path):
    with pytest.raises(ConfigError, match="--captions=8 must be 16 or more"):
        draws.run(tmp_path, shards=None, models=None, stages=[1], num_captions=8)
