"""The shapes of Kandinsky 2.2 in three sizes, as the configuration files of their networks.

`full` is the published model. `small` keeps every depth and block type and about a sixteenth of the
parameters, so that the networks' shares of a step are those of the published ones. `tiny` keeps the block
types, the tokenizer and the eightfold downsampling of the latents, and trains at dozens of samples a second
on two CPU cores.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["tiny", "small", "full"]
SIZES: tuple[Size, ...] = ("tiny", "small", "full")

NUM_TOKENS = 49_408
MAX_TOKENS = 77
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PIPELINE_CLASSES = {"prior": "KandinskyV22PriorPipeline", "decoder": "KandinskyV22Pipeline"}
"""Stage -> the diffusers pipeline that its folder holds."""

COMPONENTS: dict[str, dict[str, tuple[str, str]]] = {
    "prior": {
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "image_processor": ("transformers", "CLIPImageProcessor"),
        "prior": ("diffusers", "PriorTransformer"),
        "scheduler": ("diffusers", "UnCLIPScheduler"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    },
    "decoder": {
        "movq": ("diffusers", "VQModel"),
        "scheduler": ("diffusers", "DDPMScheduler"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    },
}
"""Stage -> component -> (library, class), as in model_index.json."""

PRIOR_SCHEDULER = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "prediction_type": "sample",
    "beta_schedule": "squaredcos_cap_v2",
}
DECODER_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Configurations of the five networks; a size's dictionaries hold what differs from the defaults."""

    prior: dict[str, Any]
    unet: dict[str, Any]
    movq: dict[str, Any]
    image_encoder: dict[str, Any]
    text_encoder: dict[str, Any]
    num_pictures: int = field(default=256)
    """Pictures over which clip_mean and clip_std are measured where none are given."""

    @property
    def image_size(self) -> int:
        """Side of the image encoder's input, pixels."""
        return int(self.image_encoder["image_size"])


_PRIOR = {
    "num_embeddings": MAX_TOKENS,
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}
_UNET = {
    "in_channels": 4,
    "out_channels": 8,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "resnet_time_scale_shift": "scale_shift",
}
_MOVQ = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
    "act_fn": "silu",
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "scaling_factor": 0.18215,
    "norm_type": "spatial",
}
_CLIP = {"hidden_act": "gelu", "attention_dropout": 0.0, "layer_norm_eps": 1e-5}
_TEXT = {
    **_CLIP,
    "max_position_embeddings": MAX_TOKENS,
    "vocab_size": NUM_TOKENS,
    # The published file's numbers. 2 makes transformers pool at the highest id, which is <|endoftext|>.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

_FULL = Architecture(
    prior={
        **_PRIOR,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "num_layers": 20,
        "embedding_dim": 1280,
    },
    unet={
        **_UNET,
        "sample_size": 64,
        "block_out_channels": [384, 768, 1152, 1536],
        "layers_per_block": 3,
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "cross_attention_dim": 768,
        "encoder_hid_dim": 1280,
        "addition_embed_type_num_heads": 64,
    },
    movq={
        **_MOVQ,
        "block_out_channels": [128, 256, 256, 512],
        "layers_per_block": 2,
        "sample_size": 32,
        "num_vq_embeddings": 16384,
        "norm_num_groups": 32,
    },
    image_encoder={
        **_CLIP,
        "hidden_size": 1664,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1280,
    },
    text_encoder={
        **_TEXT,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    # A picture costs 10^12 operations here: these give a scale without an evening on a CPU.
    num_pictures=16,
)

_SMALL = Architecture(
    prior={
        **_PRIOR,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "num_layers": 20,
        "embedding_dim": 320,
    },
    unet={
        **_UNET,
        "sample_size": 32,
        "block_out_channels": [96, 192, 288, 384],
        "layers_per_block": 3,
        "attention_head_dim": 32,
        "norm_num_groups": 32,
        "cross_attention_dim": 192,
        "encoder_hid_dim": 320,
        "addition_embed_type_num_heads": 64,
    },
    movq={
        **_MOVQ,
        "block_out_channels": [32, 64, 64, 128],
        "layers_per_block": 2,
        "sample_size": 32,
        "num_vq_embeddings": 4096,
        "norm_num_groups": 32,
    },
    image_encoder={
        **_CLIP,
        "hidden_size": 416,
        "intermediate_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 320,
    },
    text_encoder={
        **_TEXT,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 5,
        "projection_dim": 320,
    },
    num_pictures=64,
)

_TINY = Architecture(
    prior={
        **_PRIOR,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 4,
        "embedding_dim": 64,
    },
    unet={
        **_UNET,
        "sample_size": 8,
        "block_out_channels": [32, 64, 96, 128],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "encoder_hid_dim": 64,
        "addition_embed_type_num_heads": 64,
    },
    movq={
        **_MOVQ,
        # Multiples of 32: the decoder's spatial norm has 32 groups whatever norm_num_groups says.
        "block_out_channels": [32, 32, 32, 32],
        "layers_per_block": 1,
        "sample_size": 8,
        "num_vq_embeddings": 256,
        "norm_num_groups": 8,
    },
    image_encoder={
        **_CLIP,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 64,
    },
    text_encoder={
        **_TEXT,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
    },
)


def architecture(size: Size) -> Architecture:
    """The configurations of one size; the caller may change its copy."""
    return copy.deepcopy({"tiny": _TINY, "small": _SMALL, "full": _FULL}[size])


def image_processor_config(image_size: int) -> dict[str, Any]:
    """preprocessor_config.json of an image encoder of that side (pixels)."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }
