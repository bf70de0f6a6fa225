"""diffusers pipelines: writing a trained network into one, and making an image with the two."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.models.architectures import COMPONENTS
from kandinsky_dist.models.atomic import new_folder
from kandinsky_dist.models.load import Component, ModelSource, pipeline_folder
from kandinsky_dist.models.quiet import quiet_libraries

STAGES: dict[Component, str] = {"prior": "prior", "unet": "decoder"}


def write_pipeline(
    base: Path,
    component: Component,
    state_dict: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a whole pipeline folder: a copy of `base` in which one network has the given weights.

    Args:
        base: pipeline folder with all its components.
        component: the network that was trained.
        state_dict: every weight of it, by the names of `ModelSource.state_dict`; on any device.
        out: new or empty folder.
        dtype: of the stored weights.

    Raises:
        ConfigError: `base` is not whole, or `out` cannot be written.
        CheckpointError: `state_dict` is not that network's.
    """
    from safetensors.torch import save_file

    pipeline_folder(str(base), "base", list(COMPONENTS[STAGES[component]]))
    expected = ModelSource(base, component).shapes
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"{out}: the weights are not those of {base / component}: {name} is "
            f"{found.get(name, 'missing')}, must be {expected.get(name, 'absent')}"
        )
    with new_folder(out) as partial:
        shutil.copyfile(base / "model_index.json", partial / "model_index.json")
        for name in COMPONENTS[STAGES[component]]:
            is_replaced = name == component
            (partial / name).mkdir()
            for path in sorted((base / name).iterdir()):
                if path.is_file() and (path.name == "config.json" or not is_replaced):
                    shutil.copyfile(path, partial / name / path.name)
        weights = partial / component / "diffusion_pytorch_model.safetensors"
        # One copy of the network at a time: a tensor is converted only if its type differs.
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod((partial / component / "config.json").stat().st_mode)


def generate(
    prior: str,
    decoder: str,
    *,
    prompt: str,
    negative_prompt: str = "",
    out: Path,
    size: int = 512,
    num_prior_steps: int = 25,
    num_decoder_steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Makes one image from a prompt with diffusers' own combined pipeline and saves it as a PNG.

    Args:
        prior: pipeline folder or hub name, trained or published.
        decoder: likewise.
        prompt: what to show.
        negative_prompt: what to avoid.
        out: PNG file; appears whole or not at all.
        size: side, pixels; rounded up to a multiple of 64.
        num_prior_steps: denoising steps of the image embedding, at least 2.
        num_decoder_steps: denoising steps of the latents.
        guidance_scale: of the decoder; 1 switches guidance off.
        seed: of all noise.
        device: None takes a GPU where there is one.
        dtype: of the arithmetic; None is fp16 on a GPU, fp32 on a CPU.

    Raises:
        ConfigError: a folder is not what it should be, a number is out of range, there is no such device.
    """
    for name, value, least in (
        ("size", size, 1),
        ("num_prior_steps", num_prior_steps, 2),  # its scheduler divides by one less
        ("num_decoder_steps", num_decoder_steps, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} must be {least} or more")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name a file for the image")
    prior_folder = pipeline_folder(prior, "prior", list(COMPONENTS["prior"]))
    decoder_folder = pipeline_folder(decoder, "decoder", list(COMPONENTS["decoder"]))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={device} cannot be used ({reason}): use cpu or cuda") from error
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work that would be lost
    with quiet_libraries():
        pipe = _combined_pipeline(prior_folder, decoder_folder, dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        image = pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=size,
            width=size,
            prior_num_inference_steps=num_prior_steps,
            num_inference_steps=num_decoder_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        image.save(partial, format="PNG")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _combined_pipeline(prior: Path, decoder: Path, dtype: torch.dtype) -> Any:
    """The prior's components, each with the prefix prior_, in one pipeline with the decoder's."""
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    settings = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    components = DiffusionPipeline.from_pretrained(prior, **settings).components
    prefixed = {f"prior_{name}": component for name, component in components.items()}
    return AutoPipelineForText2Image.from_pretrained(decoder, **prefixed, **settings)
