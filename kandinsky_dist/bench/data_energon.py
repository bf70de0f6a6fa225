"""megatron-energon's part of a sample's way: classes that can only be made where it is installed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from torch import Tensor


@dataclass
class _Parts(Sample):
    parts: tuple[Tensor, ...]


class _TaskEncoder(DefaultTaskEncoder):
    """Makes tensors of one member of a sample."""

    decoder = None

    def __init__(self, extension: str, make: Callable[[bytes], Any]) -> None:
        super().__init__()
        self.cookers = [Cooker(self._cook)]
        self._extension = extension
        self._make = make

    @stateless
    def _cook(self, sample: CrudeSample) -> _Parts:
        made = self._make(sample[self._extension])
        return _Parts(
            __key__=sample["__key__"],
            __restore_key__=sample["__restore_key__"],
            parts=made if isinstance(made, tuple) else (made,),
        )

    def batch(self, samples: list[_Parts]) -> tuple[Tensor, ...]:
        """Stacks what the samples have in common."""
        return tuple(
            torch.stack(column) for column in zip(*(sample.parts for sample in samples), strict=True)
        )


def train_loader(
    folder: Path,
    extension: str,
    make: Callable[[bytes], Any],
    batch_size: int,
    num_workers: int,
    shuffle_samples: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of what `make` makes of a member's bytes."""
    workers = WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
    dataset = get_train_dataset(
        folder,
        worker_config=workers,
        batch_size=batch_size,
        shuffle_buffer_size=shuffle_samples,
        max_samples_per_sequence=shuffle_samples,
        task_encoder=_TaskEncoder(extension, make),
    )
    return iter(get_loader(dataset, worker_config=workers))
