"""The prior: text to CLIP image embedding, predicting x0 of the normalised embedding.

Shapes: B samples, L text tokens, D embedding width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.objectives.base import TRAINING_DRAW, Draw, Prepared, mean_losses, roll_conditions
from kandinsky_dist.objectives.cached import at_full_length
from kandinsky_dist.objectives.noise import NoiseSchedule, sample_losses
from kandinsky_dist.objectives.pixels import Normalisation


@dataclass(frozen=True, kw_only=True)
class PriorObjective:
    """Loss of the prior.

    Attributes:
        text_encoder: frozen CLIPTextModelWithProjection; None where batches bring its outputs.
        image_encoder: frozen CLIPVisionModelWithProjection, or None likewise.
        clip_mean_D, clip_std_D: fp32 statistics that embeddings are normalised with.
        schedule: squaredcos_cap_v2, sample prediction.
        normalisation: CLIP's pixel statistics.
        seed: of noise and timesteps.
        snr_gamma: min-SNR weighting, or None.
    """

    text_encoder: nn.Module | None
    image_encoder: nn.Module | None
    clip_mean_D: Tensor
    clip_std_D: Tensor
    schedule: NoiseSchedule
    normalisation: Normalisation
    seed: int
    snr_gamma: float | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Text states, pooled text and the normalised image embedding of a micro-batch.

        CLIP's text encoder is causal and gets no mask; the prior masks the padding.
        """
        assert batch.token_mask_BL is not None
        if batch.image_embeds_BD is not None:
            return self._cached(batch, batch.image_embeds_BD, batch.token_mask_BL)
        assert batch.token_ids_BL is not None
        assert batch.clip_pixels_BCHW is not None
        assert self.text_encoder is not None
        assert self.image_encoder is not None
        text = self.text_encoder(batch.token_ids_BL)
        pixels_BCHW = self.normalisation(batch.clip_pixels_BCHW)
        image_embeds_BD = self.image_encoder(pixels_BCHW).image_embeds.to(torch.float32)
        return Prepared(
            positions_B=batch.positions_B,
            clean=(image_embeds_BD - self.clip_mean_D) / self.clip_std_D,
            conditions={
                "proj_embedding": text.text_embeds,
                "encoder_hidden_states": text.last_hidden_state,
                "attention_mask": batch.token_mask_BL,
            },
        )

    def _cached(self, batch: Batch, image_embeds_BD: Tensor, mask_BL: Tensor) -> Prepared:
        """What the batch brings along."""
        assert batch.text_embeds_BD is not None
        assert batch.text_states_BLD is not None
        states_BLD, mask_BL = at_full_length(batch.text_states_BLD, mask_BL)
        return Prepared(
            positions_B=batch.positions_B,
            clean=(image_embeds_BD.to(torch.float32) - self.clip_mean_D) / self.clip_std_D,
            conditions={
                "proj_embedding": batch.text_embeds_BD.to(self.normalisation.dtype),
                "encoder_hidden_states": states_BLD.to(self.normalisation.dtype),
                "attention_mask": mask_BL,
            },
        )

    def losses(self, model: nn.Module, prepared: Prepared, *, draw: Draw = TRAINING_DRAW) -> Tensor:
        """fp32 (B,): squared error of the predicted clean embedding at a timestep drawn by position."""
        timesteps_B = draw.timesteps(self.seed, prepared.positions_B, self.schedule.num_timesteps)
        noise_BD = draw.noise(self.seed, prepared.positions_B, tuple(prepared.clean.shape[1:]))
        predicted_BD = model(
            hidden_states=self.schedule.add_noise(prepared.clean, noise_BD, timesteps_B),
            timestep=timesteps_B,
            **prepared.conditions,
        ).predicted_image_embedding
        target_BD = self.schedule.target(prepared.clean, noise_BD, timesteps_B)
        return sample_losses(self.schedule, predicted_BD, target_BD, timesteps_B, snr_gamma=self.snr_gamma)

    def evaluate(self, model: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """The unweighted loss with the right captions, with wrong ones, and of always saying the mean."""
        plain = replace(self, snr_gamma=None)
        return {
            "loss": mean_losses(plain, model, prepared),
            "loss_wrong_captions": mean_losses(plain, model, roll_conditions(prepared)),
            "loss_mean_embedding": prepared.clean.square().mean(1),
        }
