"""From a run's checkpoint to what diffusers loads: a pipeline folder, or an adapter folder for LoRA runs."""

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from kandinsky_dist.checkpoint.layout import COMMIT, CONFIG, CheckpointReader, damage
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.models.load import ModelSource, pipeline_folder
from kandinsky_dist.models.lora import adapter_shapes, save_adapters
from kandinsky_dist.models.pipeline import STAGES, write_pipeline


def export(run: Path, out: Path) -> Path:
    """Writes the newest whole checkpoint of a run, or one checkpoint folder, for inference.

    The networks that were not trained are copied from the pipeline that the run started from. Runs on one
    process, without a GPU.

    Args:
        run: run folder or checkpoint folder.
        out: folder to make.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: the pipeline that the run started from is gone.
    """
    folder = _checkpoint_folder(run)
    config = yaml.safe_load((folder / CONFIG).read_text())
    source = trained_source(config)
    reader = CheckpointReader(folder)
    if config["model"]["variant"] == "lora":
        save_adapters(source, config["model"]["lora_rank"], _adapters(source, reader, config), out)
    else:
        write_pipeline(source.folder, source.component, _full_weights(source, reader), out)
    return folder


def trained_source(config: dict[str, Any]) -> ModelSource:
    """The network that a saved configuration trained, as it was before."""
    component = next(name for name, stage in STAGES.items() if stage == config["stage"])
    key = f"model.{config['stage']}"
    folder = pipeline_folder(config["model"][config["stage"]], key, [component])
    return ModelSource(folder, component)


def _checkpoint_folder(run: Path) -> Path:
    if not run.is_dir():
        raise CheckpointError(f"{run} is no folder: give a run folder or one of its checkpoints")
    if (run / COMMIT).exists():
        reason = damage(run)
        if reason:
            raise CheckpointError(f"{run} is not a whole checkpoint: {reason}")
        return run
    folder = newest_whole(run / "checkpoints").folder
    if folder is None:
        raise CheckpointError(
            f"{run} has no whole checkpoint yet: train until checkpoint.every_steps or to the end"
        )
    return folder


def _full_weights(source: ModelSource, reader: CheckpointReader) -> dict[str, Tensor]:
    """The network's weights, trained ones from the checkpoint, frozen ones as they were."""
    weights = dict(source.state_dict())
    for name, numel in reader.numels.items():
        if name not in weights or weights[name].numel() != numel:
            raise CheckpointError(
                f"the checkpoint's {name} ({numel} values) is not a weight of {source.path}"
            )
        weights[name] = reader.read(name, "master", 0, numel).view(weights[name].shape)
    return weights


def _adapters(source: ModelSource, reader: CheckpointReader, config: dict[str, Any]) -> dict[str, Tensor]:
    shapes = adapter_shapes(source, config["model"]["lora_rank"])
    return {
        name: reader.read(name, "master", 0, numel).view(shapes[name])
        for name, numel in reader.numels.items()
    }
