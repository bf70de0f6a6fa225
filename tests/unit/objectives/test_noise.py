import pytest
import torch
from diffusers import DDPMScheduler

from kandinsky_dist.objectives.noise import NoiseSchedule, sample_losses

PRIOR = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
DECODER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
ALL_B = torch.arange(1000)
SOME_B = torch.tensor([0, 1, 17, 250, 500, 731, 998, 999])


@pytest.fixture(params=[PRIOR, DECODER], ids=["prior", "decoder"])
def scheduler(request):
    return DDPMScheduler(**request.param)


def clean_and_noise(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("shape", [(6,), (4, 3, 5)], ids=["embedding", "latents"])
def test_noised_samples_are_those_of_the_library(scheduler, shape):
    clean, noise = clean_and_noise(1000, *shape)
    ours = NoiseSchedule.of_scheduler(scheduler).add_noise(clean, noise, ALL_B)
    assert torch.equal(ours, scheduler.add_noise(clean, noise, ALL_B))


def test_target_is_clean_noise_or_velocity(scheduler):
    clean, noise = clean_and_noise(1000, 4, 3, 3)
    schedules = {
        name: NoiseSchedule(scheduler.alphas_cumprod, name) for name in ("sample", "epsilon", "v_prediction")
    }
    assert torch.equal(schedules["sample"].target(clean, noise, ALL_B), clean)
    assert torch.equal(schedules["epsilon"].target(clean, noise, ALL_B), noise)
    velocity = scheduler.get_velocity(clean, noise, ALL_B)
    assert torch.equal(schedules["v_prediction"].target(clean, noise, ALL_B), velocity)


def test_noise_level_is_never_zero_in_fp32_although_it_is_in_half_precision(scheduler):
    """B7's arithmetic: what fp32 buys, and that the schedule stays in it whatever it is given."""
    half = scheduler.alphas_cumprod.to(torch.bfloat16)
    is_cosine = scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert int(((1 - half) == 0).sum()) == (21 if is_cosine else 2)
    schedule = NoiseSchedule.of_scheduler(scheduler)
    levels_B = schedule.add_noise(torch.zeros(1000), torch.ones(1000), ALL_B)
    assert levels_B.dtype == torch.float32
    exact_B = (1 - scheduler.alphas_cumprod.double()).sqrt()
    assert levels_B.min() > 0
    torch.testing.assert_close(levels_B.double(), exact_B, rtol=1e-6, atol=0)
    bf16_clean = torch.zeros(1000, dtype=torch.bfloat16)
    assert schedule.add_noise(bf16_clean, torch.ones(1000), ALL_B).dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(scheduler, gamma):
    for t in SOME_B.tolist():
        alpha = float(scheduler.alphas_cumprod[t])
        snr = alpha / (1 - alpha)
        expected = {
            "sample": min(snr, gamma),
            "epsilon": min(snr, gamma) / snr,
            "v_prediction": min(snr, gamma) / (snr + 1),
        }
        for prediction, weight in expected.items():
            schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction)
            found_B = schedule.min_snr_weights(torch.tensor([t]), gamma)
            assert found_B.tolist() == pytest.approx([weight], rel=2e-6), (prediction, t)


def test_min_snr_on_samples_hardly_weighs_high_noise():
    """B12: why the option's text warns; at the last timestep nothing is left of a sample's loss."""
    schedule = NoiseSchedule.of_scheduler(DDPMScheduler(**PRIOR))
    weights_B = schedule.min_snr_weights(torch.tensor([0, 999]), 5.0)
    assert weights_B[0] == 5.0
    assert 0 < weights_B[1] < 1e-8


def test_losses_are_fp32_means_of_each_sample():
    predicted, target = clean_and_noise(3, 4, 2, 2)
    schedule = NoiseSchedule.of_scheduler(DDPMScheduler(**DECODER))
    timesteps_B = torch.tensor([10, 500, 999])
    plain_B = sample_losses(schedule, predicted.bfloat16(), target, timesteps_B, snr_gamma=None)
    assert plain_B.dtype == torch.float32
    expected = [((predicted[i].bfloat16().float() - target[i]) ** 2).mean().item() for i in range(3)]
    assert plain_B.tolist() == pytest.approx(expected, rel=1e-6)
    weighted_B = sample_losses(schedule, predicted.bfloat16(), target, timesteps_B, snr_gamma=5.0)
    torch.testing.assert_close(weighted_B, plain_B * schedule.min_snr_weights(timesteps_B, 5.0))
