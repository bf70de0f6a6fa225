"""The first step's loss, computed again from the libraries alone.

Everything but the draws is done anew: pictures by Pillow and transformers' processor, tokens by its
tokenizer, noising by diffusers' scheduler, networks by `from_pretrained`. Which samples, noise, timesteps
and dropouts a position has are this project's own inputs and are taken from it.
"""

import io
import json
import tarfile

import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel, VQModel
from helpers.command import losses
from helpers.forked import train
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream

pytestmark = pytest.mark.integration

NUM_SAMPLES, SEED, DROPOUT, RESOLUTION = 8, 39, 0.4, 64
POSITIONS_B = torch.arange(NUM_SAMPLES)
TIMESTEPS_B = rng.integers(SEED, Stream.TIMESTEP, POSITIONS_B, 1000)


def samples(corpus, run_dir):
    """Pictures and captions of the first step, in the order of their positions."""
    (line,) = (run_dir / "audit" / "rank_00000.jsonl").read_text().splitlines()
    members = {}
    for path in (corpus / "train").glob("*.tar"):
        with tarfile.open(path) as archive:
            members |= {entry.name: archive.extractfile(entry).read() for entry in archive}
    keys = json.loads(line)["keys"]
    images = [Image.open(io.BytesIO(members[f"{key}.png"])).convert("RGB") for key in keys]
    return images, [members[f"{key}.txt"].decode() for key in keys]


def is_dropped(stream):
    dropped = (rng.uniform(SEED, stream, POSITIONS_B) < DROPOUT).tolist()
    assert 0 < sum(dropped) < NUM_SAMPLES, "the seed must give both kinds"
    return dropped


def image_embeds(folder, images):
    processor = CLIPImageProcessorPil.from_pretrained(folder, subfolder="image_processor")
    pixels = processor(images, return_tensors="pt").pixel_values
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    return encoder(pixels).image_embeds, encoder(torch.zeros_like(pixels[:1])).image_embeds[0]


def prior_errors(models, images, captions):
    """Squared errors (B, D) of the prior, and the signal-to-noise ratios (B,)."""
    folder = models / "prior"
    dropped = is_dropped(Stream.CAPTION_DROPOUT)
    text = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    tokens = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    encoded = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder")(tokens.input_ids)
    prior = PriorTransformer.from_pretrained(folder, subfolder="prior")
    target_BD = (image_embeds(folder, images)[0] - prior.clip_mean) / prior.clip_std
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    noise_BD = rng.normal(SEED, Stream.NOISE, POSITIONS_B, tuple(target_BD.shape[1:]))
    predicted_BD = prior(
        scheduler.add_noise(target_BD, noise_BD, TIMESTEPS_B),
        timestep=TIMESTEPS_B,
        proj_embedding=encoded.text_embeds,
        encoder_hidden_states=encoded.last_hidden_state,
        attention_mask=tokens.attention_mask.bool(),
    ).predicted_image_embedding
    return (predicted_BD - target_BD) ** 2, snr(scheduler)


def decoder_errors(models, images, _captions):
    """Squared errors (B, C, H, W) of the decoder, and the signal-to-noise ratios (B,)."""
    folder = models / "decoder"
    pixels = []
    for image in images:
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        square = square.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
        values = torch.tensor(list(square.tobytes()), dtype=torch.float32)
        pixels.append(values.view(RESOLUTION, RESOLUTION, 3).permute(2, 0, 1) / 127.5 - 1)
    latents_BCHW = VQModel.from_pretrained(folder, subfolder="movq").encode(torch.stack(pixels)).latents
    embeds_BD, zero_embedding_D = image_embeds(models / "prior", images)
    for row, drop in enumerate(is_dropped(Stream.IMAGE_DROPOUT)):
        if drop:
            embeds_BD[row] = zero_embedding_D
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    noise_BCHW = rng.normal(SEED, Stream.NOISE, POSITIONS_B, tuple(latents_BCHW.shape[1:]))
    predicted_BCHW = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")(
        scheduler.add_noise(latents_BCHW, noise_BCHW, TIMESTEPS_B),
        timestep=TIMESTEPS_B,
        encoder_hidden_states=None,
        added_cond_kwargs={"image_embeds": embeds_BD},
    ).sample[:, :4]
    return (predicted_BCHW - noise_BCHW) ** 2, snr(scheduler)


def snr(scheduler):
    alphas_B = scheduler.alphas_cumprod[TIMESTEPS_B]
    return alphas_B / (1 - alphas_B)


@pytest.mark.parametrize("gamma", [None, 5.0], ids=["plain", "min_snr"])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
@torch.no_grad()
def test_first_loss_is_the_libraries(stage, gamma, tiny_models, small_corpus, tmp_path):
    dropout = "caption_dropout" if stage == "prior" else "image_embedding_dropout"
    settings = [f"run.seed={SEED}", "run.max_steps=1", f"data.{dropout}={DROPOUT}"]
    if gamma is not None:
        settings.append(f"objective.snr_gamma={gamma}")
    done = train(stage, *settings, models=tiny_models, corpus=small_corpus, run_dir=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    images, captions = samples(small_corpus, tmp_path / "run")
    errors, snr_B = (prior_errors if stage == "prior" else decoder_errors)(tiny_models, images, captions)
    losses_B = errors.flatten(1).mean(1)
    if gamma is not None:
        clipped_B = snr_B.clamp(max=gamma)
        assert 0 < (clipped_B < snr_B).sum() < NUM_SAMPLES, "the seed must give both kinds"
        losses_B = losses_B * (clipped_B if stage == "prior" else clipped_B / snr_B)
    assert losses(tmp_path / "run") == pytest.approx([losses_B.mean().item()], rel=1e-5)
