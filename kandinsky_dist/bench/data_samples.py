"""The samples that loaders are compared on, made anew from their numbers: encoder outputs and photographs.

Letters of shapes: B samples, C channels, D values of an embedding, H and W sides.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

LATENTS_CHW = (4, 64, 64)
EMBEDDING_D = 1280
NUM_LATENTS = 4 * 64 * 64
NUM_VALUES = NUM_LATENTS + EMBEDDING_D
CLIP_SIZE = 224
RESOLUTION = 512
PHOTOGRAPH_SIZE = 1024
JPEG_QUALITY = 85


def key(number: int) -> str:
    """Name of a sample."""
    return f"{number:08d}"


def encoder_outputs(num_samples: int) -> Iterator[npt.NDArray[np.float16]]:
    """Latents and embedding of each sample, one after the other in one array of NUM_VALUES.

    Random, as noise cannot be compressed; the first value is the sample's number modulo 2048.
    """
    for number in range(num_samples):
        values = np.random.default_rng(number).standard_normal(NUM_VALUES, np.float32).astype(np.float16)
        values[0] = number % 2048
        yield values


def photographs(num_samples: int, size: int = PHOTOGRAPH_SIZE) -> Iterator[bytes]:
    """JPEG files of size x size pixels, some 200 KB at 1024, with the spectrum of natural images.

    The amplitude of natural images falls with the frequency, so that they compress as these do; flat noise or
    drawings would make decoding look slower or faster than it is.
    """
    frequencies = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    amplitude_HW = (1.0 / np.maximum(frequencies, 1.0 / size)) ** 1.45
    # numpy and Pillow leave Python's lock to each other while they work.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(partial(_photograph, amplitude_HW), range(num_samples))


def _photograph(amplitude_HW: npt.NDArray[np.float64], number: int) -> bytes:
    size = len(amplitude_HW)
    random = np.random.default_rng(number)
    phases = np.exp(2j * np.pi * random.random((3, size, size // 2 + 1)))
    layers_CHW = np.fft.irfft2(amplitude_HW * phases, s=(size, size))
    layers_CHW /= layers_CHW.std((1, 2), keepdims=True)
    light_HW, *colours_HW = layers_CHW
    pixels_HWC = np.stack([light_HW, *(0.9 * light_HW + 0.3 * colour for colour in colours_HW)], -1)
    image = Image.fromarray((128 + 48 * pixels_HWC).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
