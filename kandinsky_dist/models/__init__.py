"""The networks: loading, frozen encoders, random initialisation, adapters, block-wise transforms."""

import os

import torch

if not torch.cuda.is_available():
    # diffusers imports DeepSpeed where it is installed, which would announce that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
