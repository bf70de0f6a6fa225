"""FLOPs and parameters of the published networks in `estimate`, against figures counted elsewhere."""

import pytest
from helpers.campaign import cases

from kandinsky_dist.config.loader import Layer, load
from kandinsky_dist.estimate.forecast import Assumptions, Forecaster
from kandinsky_dist.estimate.survey import Survey

pytestmark = pytest.mark.integration

TERA = 1e12
# Forward FLOPs of a sample in the frozen encoders: CLIP's vision and text towers, MoVQ's encoder.
VISION, TEXT, MOVQ = 0.967, 0.098, {512: 0.982, 768: 2.499}


def forecaster(stage, **settings):
    config = load(stage, f"{stage}_full", [Layer("test", settings)]).config
    return Forecaster(config, Survey(config), Assumptions())


def test_prior():
    found = forecaster("prior")
    whole = 3 * 0.1646  # diffusers' forward at 81 tokens, and its backward
    trained = (found.flops_per_sample() - found.survey.encoder_flops) / TERA
    # Ours asks the last of 20 layers for one token: of its 12 products of a token, 10 are for that one alone.
    assert 0.95 * whole < trained < 1.001 * whole
    assert trained == pytest.approx(whole * (1 - 10 / 12 / 20), rel=0.01)
    assert found.survey.encoder_flops / TERA == pytest.approx(VISION + TEXT, rel=0.005)
    assert found.survey.num_values / 1e6 == pytest.approx(1026.2, abs=0.05)
    assert found.survey.encoder_values / 1e6 == pytest.approx(1844.9 + 694.7, abs=0.1)


@pytest.mark.parametrize(
    ("resolution", "tflop"), cases([(512, 2.568), (768, 5.977)], lambda case: case[0] == 512)
)
def test_decoder(resolution, tflop):
    found = forecaster("decoder", **{"data.resolution": resolution})
    trained = (found.flops_per_sample() - found.survey.encoder_flops) / TERA
    assert trained == pytest.approx(tflop, abs=0.002)
    assert found.survey.encoder_flops / TERA == pytest.approx(VISION + MOVQ[resolution], rel=0.005)
    assert found.survey.num_values / 1e6 == pytest.approx(1253.1, abs=0.05)
    assert found.survey.encoder_values / 1e6 == pytest.approx(1844.9 + 27.4, abs=0.1)
