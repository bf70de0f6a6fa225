"""What diffusers' Kandinsky 2.2 scripts leave of a run: made with their libraries, by their calls."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save_script_folder(pipeline: Path, component: str, out: Path, *, num_steps: int, use_ema: bool) -> Path:
    """Takes some steps on random inputs and saves as the scripts do; returns OUT/checkpoint-NUM_STEPS.

    Source: `examples/kandinsky2_2/text_to_image/train_text_to_image_{prior,decoder}.py`.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import PriorTransformer, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    network_class: Any = PriorTransformer if component == "prior" else UNet2DConditionModel
    accelerator = Accelerator(cpu=True)
    try:
        network = network_class.from_pretrained(pipeline, subfolder=component).train()
        average = EMAModel(network.parameters(), model_cls=network_class, model_config=network.config)

        def before_saving(models: list[nn.Module], weights: list[Any], folder: str) -> None:
            if use_ema:
                average.save_pretrained(f"{folder}/{component}_ema")
            for model in models:
                model.save_pretrained(f"{folder}/{component}")
                weights.pop()

        accelerator.register_save_state_pre_hook(before_saving)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        network, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)
        generator = torch.Generator().manual_seed(0)
        for _ in range(num_steps):
            accelerator.backward(_output(network, component, generator).square().mean())
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if use_ema:
                average.step(network.parameters())
        folder = out / f"checkpoint-{num_steps}"
        accelerator.save_state(str(folder))
        return folder
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _output(network: nn.Module, component: str, generator: torch.Generator) -> Tensor:
    config: Any = network.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    if component == "prior":
        embeds, size = draw(config.embedding_dim), config.embedding_dim
        return network(embeds, 5, embeds, draw(config.num_embeddings, size)).predicted_image_embedding
    embeds = draw(config.encoder_hid_dim)
    return network(draw(4, 8, 8), 5, None, added_cond_kwargs={"image_embeds": embeds}).sample
