"""A run that another trainer has saved, and how it becomes a checkpoint of ours."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from kandinsky_dist.checkpoint.layout import (
    TEMPORARY,
    RankTensors,
    RunState,
    SavedState,
    checksum,
    folder_name,
    write_tensors,
)
from kandinsky_dist.checkpoint.writer import commit, versions
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.faults.divergence import Health
from kandinsky_dist.models.atomic import new_folder

FILE_BYTES = 2**30
"""What is held in memory, and in one file, at a time; more where a single parameter is larger."""

_STAGES = {"transformer_blocks.": "prior", "down_blocks.": "decoder"}


@dataclass(frozen=True)
class Saved:
    """What a trainer has saved.

    Attributes:
        run: where it stood.
        numels: trained parameter -> number of values.
        kinds: which tensors there are of each, as in our checkpoints.
        read: (parameter, kind) -> its values, 1-D.
        identity: what a run that goes on must share; a key that is not in it may have any value.
        config_yaml: the configuration, as far as it is known.
    """

    run: RunState
    numels: Mapping[str, int]
    kinds: tuple[str, ...]
    read: Callable[[str, str], Tensor]
    identity: Mapping[str, Any]
    config_yaml: str

    def write(self, out: Path) -> Path:
        """Makes a run folder with one checkpoint, and returns that. `out` is new or empty.

        Raises:
            CheckpointError: something in it cannot be read.
            ConfigError, DiskFullError: `out` cannot be written.
        """
        place = Path("checkpoints") / folder_name(self.run.step)
        with new_folder(out) as partial:
            folder = partial / place
            temporary = folder.with_name(folder.name + TEMPORARY)
            temporary.mkdir(parents=True)
            files = {}
            for number, names in enumerate(self._names_by_file()):
                tensors = {f"{name}@0/{kind}": self.read(name, kind) for name in names for kind in self.kinds}
                path = temporary / f"rank_{number:05d}.safetensors"
                write_tensors(path, RankTensors(tensors, {name: self.numels[name] for name in names}))
                files[path.name] = checksum(path)
            saved = SavedState(self.run, self.identity, versions())
            commit(temporary, folder, files, saved, self.config_yaml)
        return out / place

    def _names_by_file(self) -> Iterator[list[str]]:
        names: list[str] = []
        num_values, most = 0, FILE_BYTES // (4 * len(self.kinds))
        for name, numel in self.numels.items():
            if names and num_values + numel > most:
                yield names
                names, num_values = [], 0
            names.append(name)
            num_values += numel
        yield names


def stage_of(names: Mapping[str, int], where: Path) -> str:
    """Which of the two networks has parameters of these names.

    Raises:
        CheckpointError: neither.
    """
    for start, stage in _STAGES.items():
        if any(name.startswith(start) for name in names):
            return stage
    first = next(iter(names), "no parameter")
    raise CheckpointError(
        f"{where} holds {first}: its names are not those of diffusers' PriorTransformer or "
        "UNet2DConditionModel, of which one alone must have been trained"
    )


def begun_at(step: int, *, num_updates: int, samples_consumed: int, where: Path) -> RunState:
    """The state of a run that another trainer has brought to a step.

    Args:
        step: optimizer steps, skipped ones included.
        num_updates: those that changed the weights, which AdamW's bias correction counts.
        samples_consumed: position in the data at which the run goes on.
        where: the folder, for messages.
    """
    if not 0 < num_updates <= step:
        raise CheckpointError(
            f"{where}: its optimizer has taken {num_updates} steps and the run {step}: the two do not belong "
            "together"
        )
    return RunState(
        step=step,
        samples_consumed=samples_consumed,
        num_skipped_steps=step - num_updates,
        began_at_step=step,
        health=Health(last_healthy_step=step),
    )


def known_settings(stage: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Identity and configuration of a run of which only some settings are known."""
    tree: dict[str, Any] = {"stage": stage}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    text = "# What is known of a run that another trainer began.\n" + yaml.safe_dump(tree, sort_keys=False)
    return {"stage": stage, **settings}, text
