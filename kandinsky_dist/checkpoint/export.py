"""From a run's checkpoint to what diffusers loads: a pipeline folder, or an adapter folder for LoRA runs."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from kandinsky_dist.checkpoint.layout import COMMIT, CONFIG, CheckpointReader, damage
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.models.load import ModelSource, pipeline_folder
from kandinsky_dist.models.lora import adapter_shapes, save_adapters
from kandinsky_dist.models.pipeline import STAGES, write_pipeline
from kandinsky_dist.optim.ema import decays_among, kind_of


def export(run: Path, out: Path, *, ema: str | None = None, pipeline: str | None = None) -> str:
    """Writes the newest whole checkpoint of a run, or one checkpoint folder, for inference.

    The networks that were not trained are copied from the pipeline that the run started from. Runs on one
    process, without a GPU.

    Args:
        run: run folder or checkpoint folder.
        out: folder to make.
        ema: decay of the average to take in place of the weights, or "none"; None takes that with the largest
            decay, and the weights where there is no average.
        pipeline: folder or hub name, in place of the pipeline that the run started from.

    Returns:
        Which checkpoint and which of its weights were taken, one line.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: the pipeline that the run started from is gone, or there is no such average.
    """
    folder = whole_checkpoint(run)
    config = yaml.safe_load((folder / CONFIG).read_text())
    if pipeline is not None:
        config["model"][config["stage"]] = pipeline
    elif config["stage"] not in config["model"]:
        raise ConfigError(
            f"{folder} was converted and names no pipeline: give --pipeline, into which its weights are put"
        )
    source = trained_source(config)
    reader = CheckpointReader(folder)
    decay = _chosen_decay(reader, ema)
    kind = "master" if decay is None else kind_of(decay)
    if config["model"]["variant"] == "lora":
        save_adapters(source, config["model"]["lora_rank"], _adapters(source, reader, kind, config), out)
    else:
        write_pipeline(source.folder, source.component, _full_weights(source, reader, kind), out)
    if decay is not None:
        return f"exported {folder.name}: the average with decay {decay}"
    reason = ", for it has no average of them" if ema is None else ""
    return f"exported {folder.name}: the weights as trained{reason}"


def _chosen_decay(reader: CheckpointReader, ema: str | None) -> float | None:
    saved = decays_among(reader.kinds)
    if ema is None:
        return saved[-1] if saved else None
    if ema == "none":
        return None
    with suppress(ValueError):
        if float(ema) in saved:
            return float(ema)
    if not saved:
        raise ConfigError(f"--ema={ema}: {reader.folder} has no average of the weights: leave --ema out")
    raise ConfigError(
        f"--ema={ema}: {reader.folder} has averages with decay {', '.join(map(str, saved))}: name one, "
        "or none for the weights as trained"
    )


def trained_source(config: dict[str, Any]) -> ModelSource:
    """The network that a saved configuration trained, as it was before."""
    component = next(name for name, stage in STAGES.items() if stage == config["stage"])
    key = f"model.{config['stage']}"
    folder = pipeline_folder(config["model"][config["stage"]], key, [component])
    source = ModelSource(folder, component)
    weights = config["model"].get("weights")
    return source if weights is None else source.with_weights(weights)


def whole_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder, or the checkpoint folder itself.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
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


def _full_weights(source: ModelSource, reader: CheckpointReader, kind: str) -> dict[str, Tensor]:
    """The network's weights, trained ones from the checkpoint, frozen ones as they were."""
    weights = dict(source.state_dict())
    for name, numel in reader.numels.items():
        if name not in weights or weights[name].numel() != numel:
            raise CheckpointError(
                f"the checkpoint's {name} ({numel} values) is not a weight of {source.path}"
            )
        weights[name] = reader.read(name, kind, 0, numel).view(weights[name].shape)
    return weights


def _adapters(
    source: ModelSource, reader: CheckpointReader, kind: str, config: dict[str, Any]
) -> dict[str, Tensor]:
    shapes = adapter_shapes(source, config["model"]["lora_rank"])
    return {
        name: reader.read(name, kind, 0, numel).view(shapes[name]) for name, numel in reader.numels.items()
    }
