"""The `checkpoint-N` folders of diffusers' Kandinsky 2.2 training scripts, as accelerate leaves them.

    checkpoint-15000/
      prior/ or unet/              the network, by save_pretrained
      prior_ema/ or unet_ema/      the average of its weights, with --use_ema
      optimizer.bin                AdamW's state by number of parameter, a file of torch.save
      scheduler.bin, random_states_0.pkl, scaler.pt    never read

Source: `examples/kandinsky2_2/text_to_image/train_text_to_image_{prior,decoder}.py` of diffusers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.checkpoint.foreign.kinds import NETWORKS
from kandinsky_dist.checkpoint.foreign.plain import flat, load_plain
from kandinsky_dist.checkpoint.foreign.saved import Saved, begun_at, known_settings
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.models.load import STATISTICS, Component, ModelSource
from kandinsky_dist.models.pipeline import STAGES
from kandinsky_dist.models.zero_init import outside_zero_init
from kandinsky_dist.optim.ema import kind_of
from kandinsky_dist.parallel.base import FRAGMENT_KINDS

_PLAIN_AVERAGE = {"use_ema_warmup": False, "update_after_step": 0, "min_decay": 0.0}
"""EMAModel's settings under which it computes what optim.ema_decay does."""


def read_script_folder(folder: Path, *, step: int | None, global_batch_size: int | None) -> Saved:
    """What a script has saved.

    Args:
        folder: checkpoint-N; N are the optimizer steps.
        step: in place of N.
        global_batch_size: samples a step, over all processes and accumulated ones; the folder does not say.

    Raises:
        CheckpointError: it is not whole, or of another network or optimizer.
        ConfigError: the network's own folder is damaged.
    """
    component = _component(folder)
    if step is None:
        found = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
        if found is None:
            raise CheckpointError(f"{folder}: its name is not checkpoint-N: say N with --step")
        step = int(found[1])
    if global_batch_size is None:
        raise CheckpointError(
            f"{folder} does not say its batch: give --global-batch-size, which was --train_batch_size x "
            "processes x --gradient_accumulation_steps"
        )
    source = ModelSource(folder, component)
    with outside_zero_init(), torch.device("meta"):
        shapes = {name: item.shape for name, item in source.build().named_parameters()}
    weights = {"master": source.state_dict()}
    moments, num_updates = _moments(folder / "optimizer.bin", shapes)
    run = begun_at(step, num_updates=num_updates, samples_consumed=step * global_batch_size, where=folder)
    average = folder / f"{component}_ema"
    if average.is_dir():
        kind, run.num_averaged[kind] = _average(average)
        weights[kind] = source.with_weights(str(average)).state_dict()
    trained = {name: shape.numel() for name, shape in shapes.items() if name not in STATISTICS}

    def read(name: str, kind: str) -> Tensor:
        if kind in weights:
            return flat(weights[kind][name], f"{folder}: {name}")
        # AdamW makes moments with the first gradient, and they begin with 0.
        return flat(moments[name][kind], name) if name in moments else torch.zeros(trained[name])

    identity, text = known_settings(
        STAGES[component], {"model.variant": "full", "data.global_batch_size": global_batch_size}
    )
    kinds = (*FRAGMENT_KINDS, *(kind for kind in weights if kind != "master"))
    return Saved(run, trained, kinds, read, identity, text)


def _component(folder: Path) -> Component:
    for name in NETWORKS:
        if (folder / name / "config.json").is_file():
            return "prior" if name == "prior" else "unet"
    raise CheckpointError(
        f"{folder} has no folder prior or unet with a config.json: only what the scripts that train whole "
        "networks save is read, not that of their LoRA forms"
    )


def _moments(path: Path, shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Mapping[str, Any]], int]:
    """Parameter -> its state, for those that have had a gradient; and how often AdamW has updated them.

    The scripts give all parameters of the network to AdamW as one group, clip_mean and clip_std too, which
    have never had a gradient. So a number is the parameter's place in the network.
    """
    content = load_plain(path)
    try:
        numbers = [number for group in content["param_groups"] for number in group["params"]]
        states: Mapping[int, Mapping[str, Any]] = content["state"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the state of an optimizer: it lacks {error}") from error
    if len(numbers) != len(shapes):
        raise CheckpointError(
            f"{path} is of {len(numbers)} parameters, the network beside it has {len(shapes)}"
        )
    moments, counts = {}, set()
    for number, (name, shape) in zip(numbers, shapes.items(), strict=True):
        state = states.get(number)
        if not state or name in STATISTICS:
            continue
        found = {kind: getattr(state.get(kind), "shape", None) for kind in FRAGMENT_KINDS[1:]}
        for kind, saved in found.items():
            if saved != shape:
                raise CheckpointError(
                    f"{path}: {kind} of parameter {number}, {name}, is {_words(saved)}, must be "
                    f"{_words(shape)}: only AdamW of torch, over the network beside it, is read"
                )
        moments[name] = state
        counts.add(int(state["step"]))
    if len(counts) != 1:
        raise CheckpointError(f"{path}: its parameters have taken {sorted(counts)} steps, must be one number")
    return moments, counts.pop()


def _words(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _average(folder: Path) -> tuple[str, int]:
    """The kind of a saved average, and how many steps are in it."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        kind, num_updates = kind_of(float(settings["decay"])), int(settings["optimization_step"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json is not that of an average: {error}") from error
    other = {
        key: settings.get(key) for key, value in _PLAIN_AVERAGE.items() if settings.get(key, value) != value
    }
    if other:
        raise CheckpointError(
            f"{folder} is an average with {json.dumps(other)}, which optim.ema_decay does not compute: "
            "remove the folder to go on without it"
        )
    return kind, num_updates
