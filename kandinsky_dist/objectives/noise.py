"""Noise schedules and the forward diffusion, in fp32 whatever the model's precision.

In bf16 the noise level of the prior is exactly 0 for 21 timesteps and off by more than 1% for 132.

Shapes: T timesteps, B samples, ... the shape of one sample.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["sample", "epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """Cumulative signal shares of a diffusion.

    Attributes:
        alphas_cumprod_T: fp32, decreasing, in (0, 1).
        prediction: what the model's output is read as.
    """

    alphas_cumprod_T: Tensor
    prediction: Prediction

    @classmethod
    def of_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule that a diffusers scheduler holds."""
        return cls(scheduler.alphas_cumprod.to(torch.float32), scheduler.config.prediction_type)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same on a device."""
        return NoiseSchedule(self.alphas_cumprod_T.to(device), self.prediction)

    @property
    def num_timesteps(self) -> int:
        """Length of the diffusion."""
        return len(self.alphas_cumprod_T)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Source: Ho et al. 2020 (arXiv 2006.11239), equation 4.
        """
        alphas = _column(self.alphas_cumprod_T[timesteps_B], clean)
        return alphas.sqrt() * clean + (1.0 - alphas).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the model should have said.

        v = sqrt(abar) eps - sqrt(1 - abar) x_0.

        Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D, for v-prediction.
        """
        if self.prediction == "sample":
            return clean
        if self.prediction == "epsilon":
            return noise
        alphas = _column(self.alphas_cumprod_T[timesteps_B], clean)
        return alphas.sqrt() * noise - (1.0 - alphas).sqrt() * clean

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar), fp32 (B,)."""
        alphas_B = self.alphas_cumprod_T[timesteps_B]
        return alphas_B / (1.0 - alphas_B)

    def min_snr_weights(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """Per-sample loss weights, fp32 (B,): min(SNR, gamma), over SNR or SNR + 1 by prediction.

        Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
        """
        snr_B = self.snr(timesteps_B)
        clipped_B = snr_B.clamp(max=gamma)
        if self.prediction == "sample":
            return clipped_B
        return clipped_B / (snr_B if self.prediction == "epsilon" else snr_B + 1.0)


def sample_losses(
    schedule: NoiseSchedule,
    predicted: Tensor,
    target: Tensor,
    timesteps_B: Tensor,
    *,
    snr_gamma: float | None,
) -> Tensor:
    """Mean squared error of each sample in fp32, weighted where `snr_gamma` is set.

    Returns:
        fp32 (B,).
    """
    losses_B = (predicted.to(torch.float32) - target.to(torch.float32)).square().flatten(1).mean(1)
    if snr_gamma is None:
        return losses_B
    return losses_B * schedule.min_snr_weights(timesteps_B, snr_gamma)


def _column(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (like.dim() - 1))
