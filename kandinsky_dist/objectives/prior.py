"""The prior: text to CLIP image embedding, predicting x0 of the normalised embedding.

Shapes: B samples, L text tokens, K noise draws, N = B x K, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.objectives.base import NUM_HELD_OUT_DRAWS, TRAINING_DRAW, Draw, Prepared, roll_conditions
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
        noise_draws: K, noises and timesteps of a sample in one forward pass, which share its text.
        token_multiple: the text tokens that are computed are a multiple of so many a sample, for few shapes;
            0: those that there are; None: every text is as long as the longest, padding included.
    """

    text_encoder: nn.Module | None
    image_encoder: nn.Module | None
    clip_mean_D: Tensor
    clip_std_D: Tensor
    schedule: NoiseSchedule
    normalisation: Normalisation
    seed: int
    snr_gamma: float | None = None
    noise_draws: int = 1
    token_multiple: int | None = None

    def num_computed_tokens(self, batch: Batch) -> int | None:
        """Text tokens of a micro-batch that the network computes; None: all B x L."""
        if self.token_multiple is None:
            return None
        unit = max(1, len(batch) * self.token_multiple)
        return min(-(-batch.num_text_tokens // unit) * unit, len(batch) * batch.text_length)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Text states, pooled text and the normalised image embedding of a micro-batch.

        CLIP's text encoder is causal and gets no mask; the prior masks the padding. Text may be cut to the
        longest of the batch, the end token of each included, where CLIP pools.
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
            num_text_tokens=self.num_computed_tokens(batch),
        )

    def _cached(self, batch: Batch, image_embeds_BD: Tensor, mask_BL: Tensor) -> Prepared:
        """What the batch brings along."""
        assert batch.text_embeds_BD is not None
        assert batch.text_states_BLD is not None
        return Prepared(
            positions_B=batch.positions_B,
            clean=(image_embeds_BD.to(torch.float32) - self.clip_mean_D) / self.clip_std_D,
            conditions={
                "proj_embedding": batch.text_embeds_BD.to(self.normalisation.dtype),
                "encoder_hidden_states": batch.text_states_BLD.to(self.normalisation.dtype),
                "attention_mask": mask_BL,
            },
            num_text_tokens=self.num_computed_tokens(batch),
        )

    def losses(self, model: nn.Module, prepared: Prepared, *, draw: Draw = TRAINING_DRAW) -> Tensor:
        """fp32 (B,): squared error of the predicted clean embedding at timesteps drawn by position.

        With several noise draws the mean over them: `draw` is split.
        """
        draws = draw.split(self.noise_draws)
        embedding_shape = prepared.clean.shape[1:]
        timesteps_N = _joined(
            [item.timesteps(self.seed, prepared.positions_B, self.schedule.num_timesteps) for item in draws]
        )
        noise_ND = _joined(
            [item.noise(self.seed, prepared.positions_B, tuple(embedding_shape)) for item in draws]
        )
        clean_ND = prepared.clean.repeat_interleave(self.noise_draws, dim=0)
        noised_ND = self.schedule.add_noise(clean_ND, noise_ND, timesteps_N)
        # One draw is given as diffusers' own forward takes it.
        shape = (len(prepared.clean),) if self.noise_draws == 1 else (len(prepared.clean), self.noise_draws)
        # diffusers' own forward knows nothing of texts without padding either.
        counts = {} if prepared.num_text_tokens is None else {"num_text_tokens": prepared.num_text_tokens}
        predicted = model(
            hidden_states=noised_ND.view(*shape, *embedding_shape),
            timestep=timesteps_N.view(shape),
            **prepared.conditions,
            **counts,
        ).predicted_image_embedding
        losses_N = sample_losses(
            self.schedule,
            predicted.view_as(clean_ND),
            self.schedule.target(clean_ND, noise_ND, timesteps_N),
            timesteps_N,
            snr_gamma=self.snr_gamma,
        )
        return losses_N.view(-1, self.noise_draws).mean(1)

    def evaluate(self, model: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """The unweighted loss with the right captions, with wrong ones, and of always saying the mean."""
        plain = replace(self, snr_gamma=None, noise_draws=NUM_HELD_OUT_DRAWS)
        return {
            "loss": plain.losses(model, prepared),
            "loss_wrong_captions": plain.losses(model, roll_conditions(prepared)),
            "loss_mean_embedding": prepared.clean.square().mean(1),
        }


def _joined(draws: Sequence[Tensor]) -> Tensor:
    """(B, ...) of each draw as (B x K, ...), a sample's draws next to each other."""
    return draws[0] if len(draws) == 1 else torch.stack(list(draws), dim=1).flatten(0, 1)
