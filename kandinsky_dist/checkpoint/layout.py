"""What a checkpoint folder holds, and how any range of any parameter is read back from it.

    step_00001000/
      rank_00000.safetensors   this rank's fragments, each a 1-D fp32 tensor "NAME@START/KIND"; kinds are
                               master, exp_avg, exp_avg_sq, and ema_DECAY for each average of the weights
      state.json               step, samples_consumed, identity of the run, versions
      config.yaml              the resolved configuration
      COMMIT                   size and sha256 of every file; written last

A folder without COMMIT, or whose files differ from it, is not a checkpoint. Nothing in it is a pickle.
"""

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kandinsky_dist.checkpoint.files import (
    COMMIT,
    CONFIG,
    STATE,
    TEMPORARY,
    checkpoints_of,
    checksum,
    damage,
    folder_name,
    promised_files,
    step_of,
)
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.faults.divergence import Health
from kandinsky_dist.parallel.base import FRAGMENT_KINDS, Fragment
from kandinsky_dist.runtime.disk import sync, write_whole

__all__ = [
    "COMMIT",
    "CONFIG",
    "STATE",
    "TEMPORARY",
    "CheckpointReader",
    "RankTensors",
    "RunState",
    "SavedState",
    "checkpoints_of",
    "checksum",
    "damage",
    "folder_name",
    "promised_files",
    "read_state",
    "step_of",
    "write_state",
    "write_tensors",
]


@dataclass
class RunState:
    """Where a run stands. Data order, noise and learning rate follow from `step` and `samples_consumed`.

    Both grow alike, until a run goes back to an earlier step (`num_rollbacks` times so far) and on with the
    next samples. `pending_losses` are the global losses of steps since the last log entry and
    `pending_skipped` whether these were skipped, `pending_rescaled` whether for a loss scale that was lowered
    then, so that a resumed run's next entry is about the same steps;
    `num_skipped_steps` and `health` are about the steps before them. `num_bad_samples` counts those that were
    replaced so far, `began_at_step` is above 0 where the first weights were another run's, `num_averaged` are
    the steps that are in each average of the weights, by its kind, `engine` is what the strategy asks to
    remember: numbers with names that any strategy understands or passes over.
    """

    step: int = 0
    samples_consumed: int = 0
    pending_losses: list[float] = field(default_factory=list)
    num_bad_samples: int = 0
    num_averaged: dict[str, int] = field(default_factory=dict)
    pending_skipped: list[bool] = field(default_factory=list)
    num_skipped_steps: int = 0
    num_rollbacks: int = 0
    began_at_step: int = 0
    health: Health = field(default_factory=Health)
    pending_rescaled: list[bool] = field(default_factory=list)
    engine: dict[str, float] = field(default_factory=dict)

    @property
    def num_updates(self) -> int:
        """Steps that have changed the weights, which AdamW's bias correction counts. Of a saved state."""
        return self.step - self.num_skipped_steps - sum(self.pending_skipped)

    def advance(self, num_samples: int) -> None:
        """Counts one optimizer step."""
        self.step += 1
        self.samples_consumed += num_samples


@dataclass(frozen=True)
class SavedState:
    """The content of state.json."""

    run: RunState
    identity: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class RankTensors:
    """What one rank saves: tensors by their name in its file, and the sizes of the parameters they are of."""

    tensors: Mapping[str, Tensor]
    numels: Mapping[str, int]

    @classmethod
    def of(
        cls, fragments: Sequence[Fragment], extra: Mapping[str, Sequence[Tensor]] | None = None
    ) -> "RankTensors":
        """A rank's fragments, live and not copied.

        Args:
            fragments: what the rank owns.
            extra: further kind -> one 1-D tensor for each fragment, with the same values' range.
        """
        kinds = {kind: [getattr(item, kind) for item in fragments] for kind in FRAGMENT_KINDS}
        return cls(
            {
                f"{item.name}@{item.start}/{kind}": tensor
                for kind, parallel in (kinds | dict(extra or {})).items()
                for item, tensor in zip(fragments, parallel, strict=True)
            },
            {item.name: item.numel for item in fragments},
        )


def write_tensors(path: Path, saved: RankTensors) -> None:
    """Writes one rank's file, durable on return."""
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in saved.tensors.items()}
    save_file(tensors, path, metadata={"numels": json.dumps(saved.numels)})
    sync(path)


def write_state(path: Path, saved: SavedState) -> None:
    """Writes state.json."""
    write_whole(path, json.dumps(asdict(saved), indent=1) + "\n")


def read_state(folder: Path) -> SavedState:
    """Reads state.json."""
    tree = json.loads((folder / STATE).read_text())
    run = tree["run"]
    health = Health(**run.pop("health", {"last_healthy_step": run["step"]}))
    return SavedState(RunState(**run, health=health), tree["identity"], tree["versions"])


class CheckpointReader:
    """Fragments of a checkpoint by parameter name and range, whoever wrote them at whatever world size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numels: dict[str, int] = {}
        self.kinds: set[str] = set()
        pieces: defaultdict[str, list[tuple[int, Path]]] = defaultdict(list)
        for path in sorted(folder.glob("rank_*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self.numels.update(json.loads(file.metadata()["numels"]))
                    for key in file.keys():  # noqa: SIM118 - not a mapping
                        label, _, kind = key.rpartition("/")
                        self.kinds.add(kind)
                        if kind == FRAGMENT_KINDS[0]:
                            name, _, start = label.rpartition("@")
                            pieces[name].append((int(start), path))
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._pieces = {name: sorted(found, key=lambda piece: piece[0]) for name, found in pieces.items()}
        self._files: dict[Path, Any] = {}

    @cached_property
    def state(self) -> SavedState:
        """The checkpoint's state.json.

        Raises:
            CheckpointError: it cannot be read, or not by this version.
        """
        try:
            return read_state(self.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / STATE} cannot be read ({error}): was it written by another version?"
            ) from error

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened parameter, 1-D fp32 on the CPU.

        Raises:
            CheckpointError: the checkpoint does not cover the range.
        """
        pieces = self._pieces.get(name)
        if pieces is None:
            raise CheckpointError(
                f"{self.folder} holds no parameter {name}: it is a checkpoint of another model"
            )
        parts, position = [], start
        index = bisect_right([piece[0] for piece in pieces], start) - 1
        while position < stop and 0 <= index < len(pieces):
            piece_start, path = pieces[index]
            saved = self._open(path).get_slice(f"{name}@{piece_start}/{kind}")
            piece_stop = piece_start + saved.get_shape()[0]
            if piece_stop <= position:
                break
            parts.append(saved[position - piece_start : min(stop, piece_stop) - piece_start])
            position = min(stop, piece_stop)
            index += 1
        if position < stop:
            raise CheckpointError(f"{self.folder} ends at value {position} of {name}, {stop} are needed")
        return torch.cat(parts) if parts else torch.empty(0)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is gone or damaged since it was found: {error}") from error
        return self._files[path]
