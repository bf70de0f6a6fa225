"""The decoder: CLIP image embedding to MoVQ latents, predicting the noise.

Shapes: B samples, C channels, H x W latent pixels, D embedding width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.objectives.base import TRAINING_DRAW, Draw, Prepared, mean_losses, roll_conditions
from kandinsky_dist.objectives.noise import NoiseSchedule, sample_losses
from kandinsky_dist.objectives.pixels import Normalisation
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream


@dataclass(frozen=True, kw_only=True)
class DecoderObjective:
    """Loss of the decoder.

    Attributes:
        image_encoder: frozen CLIPVisionModelWithProjection; None where batches bring its outputs.
        movq: frozen VQModel, or None likewise; its latents are neither quantised nor scaled.
        zero_embedding_D: the encoder's embedding of zeros, which the guidance branch is conditioned on.
        schedule: linear betas, epsilon prediction.
        clip_normalisation, movq_normalisation: pixel statistics of the two encoders.
        image_embedding_dropout: share of embeddings replaced by `zero_embedding_D`.
        seed: of noise, timesteps and dropout.
        snr_gamma: min-SNR weighting, or None.
    """

    image_encoder: nn.Module | None
    movq: nn.Module | None
    zero_embedding_D: Tensor
    schedule: NoiseSchedule
    clip_normalisation: Normalisation
    movq_normalisation: Normalisation
    image_embedding_dropout: float
    seed: int
    snr_gamma: float | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Latents and image embedding of a micro-batch."""
        embeds_BD, latents_BCHW = batch.image_embeds_BD, batch.latents_BCHW
        if embeds_BD is None or latents_BCHW is None:
            assert batch.clip_pixels_BCHW is not None
            assert batch.pixels_BCHW is not None
            assert self.image_encoder is not None
            assert self.movq is not None
            embeds_BD = self.image_encoder(self.clip_normalisation(batch.clip_pixels_BCHW)).image_embeds
            latents_BCHW = self.movq.encode(self.movq_normalisation(batch.pixels_BCHW)).latents  # type: ignore[operator]
        assert embeds_BD is not None
        assert latents_BCHW is not None
        return Prepared(
            positions_B=batch.positions_B,
            clean=latents_BCHW.to(torch.float32),
            conditions={"image_embeds": embeds_BD.to(torch.float32)},
        )

    def losses(self, model: nn.Module, prepared: Prepared, *, draw: Draw = TRAINING_DRAW) -> Tensor:
        """fp32 (B,): squared error of the predicted noise; the model's variance channels are not trained."""
        positions_B = prepared.positions_B
        embeds_BD = prepared.conditions["image_embeds"]
        is_dropped_B = (
            rng.uniform(self.seed, Stream.IMAGE_DROPOUT, positions_B) < self.image_embedding_dropout
        )
        embeds_BD = torch.where(is_dropped_B[:, None], self.zero_embedding_D, embeds_BD)
        timesteps_B = draw.timesteps(self.seed, positions_B, self.schedule.num_timesteps)
        noise_BCHW = draw.noise(self.seed, positions_B, tuple(prepared.clean.shape[1:]))
        predicted_BCHW = model(
            sample=self.schedule.add_noise(prepared.clean, noise_BCHW, timesteps_B),
            timestep=timesteps_B,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": embeds_BD},
        ).sample[:, : prepared.clean.shape[1]]
        target_BCHW = self.schedule.target(prepared.clean, noise_BCHW, timesteps_B)
        return sample_losses(
            self.schedule, predicted_BCHW, target_BCHW, timesteps_B, snr_gamma=self.snr_gamma
        )

    def evaluate(self, model: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """The unweighted loss without dropout, with the right embeddings and with wrong ones."""
        plain = replace(self, snr_gamma=None, image_embedding_dropout=0.0)
        return {
            "loss": mean_losses(plain, model, prepared),
            "loss_wrong_embeddings": mean_losses(plain, model, roll_conditions(prepared)),
        }
