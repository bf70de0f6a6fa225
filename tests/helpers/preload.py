"""What any run and most benches import and build first: the fork server does it once for all of them."""

# ruff: noqa: F401
import gc

import accelerate
import deepspeed.runtime.zero.muon.muon_optimizer  # brings inductor, which takes as long as all else
import diffusers.models.autoencoders.vq_model
import diffusers.models.transformers.prior_transformer
import diffusers.models.unets.unet_2d_condition
import diffusers.schedulers.scheduling_ddpm
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy.ma
import transformers.models.clip.modeling_clip
import transformers.models.clip.tokenization_clip
from PIL import Image
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import kandinsky_dist.bench.scaling
import kandinsky_dist.bench.train
import kandinsky_dist.checkpoint.export
import kandinsky_dist.models.init
import kandinsky_dist.models.prior
import kandinsky_dist.train.trainer

Image.init()
get_checkpoint_conversion_mapping("clip")  # a thousand regular expressions
gc.collect()
gc.freeze()  # half a million objects, which every collection of every rank would look through, and so copy
