"""DeepSpeed's universal checkpoints, which its engines load at any stage and world size.

    OUT/latest_universal                   names the folder beside it
    OUT/global_step1000_universal/
      zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt    {"param": tensor}, or the tensor alone
      zero/NAME/step.pt                    updates; missing where ZeRO-3 wrote
      zero/optimizer_state.pt              what is not of a single parameter
      *_model_states.pt                    steps, samples, configuration

Beside these, one that we write has our state.json, config.yaml and averages/KIND/NAME.pt, of which DeepSpeed
takes no notice: it comes back as the checkpoint that it was.

Source: `deepspeed/checkpoint/ds_to_universal.py`, `universal_checkpoint.py`, `runtime/zero/stage3.py` (0.19).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.checkpoint.foreign.kinds import LATEST_UNIVERSAL
from kandinsky_dist.checkpoint.foreign.plain import flat, load_plain
from kandinsky_dist.checkpoint.foreign.saved import Saved, begun_at, known_settings, stage_of
from kandinsky_dist.checkpoint.layout import CONFIG, STATE, CheckpointReader, RunState, read_state
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.models.atomic import new_folder
from kandinsky_dist.parallel.base import FRAGMENT_KINDS

FILES = dict(zip(FRAGMENT_KINDS, ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"), strict=True))
"""Our name of a tensor -> DeepSpeed's file."""

_AVERAGES = "averages"
_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Stages 0 to 2 look for the first, stage 3 for the second."""

_NUM_GROUPS = 64
"""DeepSpeed goes through the engine's parameter groups and these side by side and stops at the shorter end.
Ours are empty, so that the engine keeps the hyperparameters of its own configuration."""

_WRITTEN_AS = "0.18.0"


def read_universal(folder: Path, *, step: int | None, global_batch_size: int | None) -> Saved:
    """What a universal checkpoint holds.

    Args:
        folder: the checkpoint, or the one with `latest_universal` in it.
        step: optimizer steps of the run, where its files are not to be asked.
        global_batch_size: samples a step, likewise.

    Raises:
        CheckpointError: it is not whole, holds objects that are not read, or is of another network.
    """
    if (folder / LATEST_UNIVERSAL).is_file():
        folder = folder / (folder / LATEST_UNIVERSAL).read_text(errors="replace").strip()
    source = _Universal(folder)
    if (folder / STATE).is_file():
        own = read_state(folder)
        kinds = sorted(path.name for path in (folder / _AVERAGES).glob("*") if path.is_dir())
        return Saved(
            own.run,
            source.numels,
            (*FRAGMENT_KINDS, *kinds),
            source.read,
            own.identity,
            (folder / CONFIG).read_text(),
        )
    stage = stage_of(source.numels, folder)
    is_told = step is not None and global_batch_size is not None
    position = {} if is_told else source.position()
    batch = global_batch_size or position["train_batch_size"]
    if step is None and global_batch_size is None:
        step, samples_consumed = position["global_steps"], position["global_samples"]
    else:
        step = step or position["global_steps"]
        samples_consumed = step * batch
    num_updates = source.num_updates()
    if num_updates is None:
        num_updates = step - position.get("skipped_steps", 0)
    run = begun_at(step, num_updates=num_updates, samples_consumed=samples_consumed, where=folder)
    variant = "lora" if any("lora_" in name for name in source.numels) else "full"
    identity, text = known_settings(stage, {"model.variant": variant, "data.global_batch_size": batch})
    return Saved(run, source.numels, FRAGMENT_KINDS, source.read, identity, text)


@dataclass(frozen=True)
class _Universal:
    """The files of one universal checkpoint."""

    folder: Path

    @cached_property
    def numels(self) -> dict[str, int]:
        """Parameters with moments; what has only weights was not trained."""
        found = {}
        for path in sorted((self.folder / "zero").glob("*/exp_avg.pt")):
            name = path.parent.name
            sizes = {kind: self.read(name, kind).numel() for kind in FRAGMENT_KINDS}
            if len(set(sizes.values())) > 1:
                raise CheckpointError(
                    f"{path.parent}: its tensors have {sizes} values, and must have as many"
                )
            found[name] = sizes[FRAGMENT_KINDS[0]]
        if not found:
            raise CheckpointError(f"{self.folder} has no zero/*/exp_avg.pt: it is no universal checkpoint")
        return found

    def read(self, name: str, kind: str) -> Tensor:
        """Values of a parameter, 1-D."""
        if kind in FILES:
            path = self.folder / "zero" / name / FILES[kind]
        else:
            path = self.folder / _AVERAGES / kind / f"{name}.pt"
        content = load_plain(path)
        return flat(content.get("param") if isinstance(content, Mapping) else content, str(path))

    def num_updates(self) -> int | None:
        """Steps that AdamW counts, None where they are not written."""
        paths = (self.folder / "zero" / name / "step.pt" for name in self.numels)
        counts = {int(load_plain(path)) for path in paths if path.is_file()}
        if len(counts) > 1:
            raise CheckpointError(
                f"{self.folder}: its parameters have taken {sorted(counts)} steps; ours take all the same"
            )
        return next(iter(counts), None)

    def position(self) -> dict[str, int]:
        """Steps and samples so far, and samples a step; checks that no trained parameter is missing.

        Raises:
            CheckpointError: the file that says it is missing, holds other objects, or speaks of more.
        """
        path = min(self.folder.glob("*_model_states.pt"), default=self.folder / _MODEL_STATES[0])
        try:
            content = load_plain(path)
            found = {key: int(content[key]) for key in ("global_steps", "global_samples", "skipped_steps")}
            found["train_batch_size"] = int(content["ds_config"]["train_batch_size"])
            shapes = {name: shape for group in content["param_shapes"] for name, shape in group.items()}
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error if isinstance(error, CheckpointError) else f"{path} lacks {error}"
            raise CheckpointError(f"{reason}: give --step and --global-batch-size in its place") from error
        for name, shape in shapes.items():
            if self.numels.get(name) != shape.numel():
                raise CheckpointError(
                    f"{self.folder / 'zero' / name} has {self.numels.get(name, 'no')} values, the model had "
                    f"{shape.numel()}: run ds_to_universal once more"
                )
        return found


def write_universal(checkpoint: Path, out: Path) -> Path:
    """Writes a checkpoint of ours as a universal one; returns its folder. `out` is new or empty.

    A DeepSpeed engine with `{"checkpoint": {"load_universal": true}}` loads it by `load_checkpoint(out)`, at
    stages 1 to 3 and any world size. Tensors are 1-D, as ZeRO-3's are.

    Of any universal checkpoint, stage 3 gives all of the engine's parameter groups one tensor to count their
    steps in (DeepSpeed 0.19.8): an optimizer with two of them counts each step twice, unless its program puts
    a copy into the state of each.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError, DiskFullError: `out` cannot be written.
    """
    reader = CheckpointReader(checkpoint)
    run = reader.state.run
    step = torch.tensor(float(run.num_updates))
    tag = f"global_step{run.step}_universal"
    with new_folder(out) as partial:
        folder = partial / tag
        for kind in sorted(reader.kinds - set(FILES)):
            (folder / _AVERAGES / kind).mkdir(parents=True)
        for name, numel in reader.numels.items():
            (folder / "zero" / name).mkdir(parents=True)
            torch.save(step, folder / "zero" / name / "step.pt")
            for kind in reader.kinds:
                values = reader.read(name, kind, 0, numel)
                if kind in FILES:
                    torch.save({"cat_dim": 0, "param": values}, folder / "zero" / name / FILES[kind])
                else:
                    torch.save(values, folder / _AVERAGES / kind / f"{name}.pt")
        common = _common_state(step)
        torch.save(common, folder / "zero" / "optimizer_state.pt")
        for name in _MODEL_STATES:
            torch.save(_model_state(run, reader), folder / name)
        for name in (STATE, CONFIG):
            shutil.copyfile(checkpoint / name, folder / name)
        (partial / LATEST_UNIVERSAL).write_text(tag)
    return out / tag


def _common_state(step: Tensor) -> dict[str, Any]:
    """What DeepSpeed's stages ask of optimizer_state.pt: 1 and 2 the first two entries, 3 the last."""
    groups: list[dict[str, Any]] = [{} for _ in range(_NUM_GROUPS)]
    inner = {"state": {0: {"step": step}}, "param_groups": groups}
    return {"ds_version": _WRITTEN_AS, "param_groups": groups, "optimizer_state_dict": inner}


def _model_state(run: RunState, reader: CheckpointReader) -> dict[str, Any]:
    """Where the run stands, for DeepSpeed. Weights are not here: it takes them from zero/."""
    num_updates = run.num_updates  # a schedule of DeepSpeed or torch does not count skipped steps
    return {
        "module": {},
        "param_shapes": [{name: torch.Size([numel]) for name, numel in reader.numels.items()}],
        "global_steps": run.step,
        "global_samples": run.samples_consumed,
        "skipped_steps": run.step - num_updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        # DeepSpeed's schedules read the first, torch's the second.
        "lr_scheduler": {"last_batch_iteration": num_updates - 1, "last_epoch": num_updates},
        "ds_config": {"train_batch_size": reader.state.identity.get("data.global_batch_size")},
        "ds_version": _WRITTEN_AS,
    }
