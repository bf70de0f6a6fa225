import numpy as np
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kandinsky_dist.models.architectures import CLIP_MEAN, CLIP_STD
from kandinsky_dist.objectives.pixels import Normalisation
from kandinsky_dist.train.build import MOVQ_STATISTICS

PIXELS_BHWC = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
PIXELS_BCHW = torch.from_numpy(PIXELS_BHWC).permute(0, 3, 1, 2)


def test_clips_pixels_are_those_of_its_processor():
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    expected = processor(list(PIXELS_BHWC), return_tensors="pt").pixel_values
    ours = Normalisation(CLIP_MEAN, CLIP_STD, torch.float32)(PIXELS_BCHW)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-6)


def test_movqs_pixels_are_between_minus_one_and_one():
    ours = Normalisation(MOVQ_STATISTICS, MOVQ_STATISTICS, torch.float32)(PIXELS_BCHW)
    torch.testing.assert_close(ours, PIXELS_BCHW.float() / 127.5 - 1, rtol=0, atol=2e-7)


def test_half_precision_is_rounded_once_at_the_end():
    exact = Normalisation(CLIP_MEAN, CLIP_STD, torch.float32)(PIXELS_BCHW)
    half = Normalisation(CLIP_MEAN, CLIP_STD, torch.bfloat16)(PIXELS_BCHW)
    assert torch.equal(half, exact.to(torch.bfloat16))
