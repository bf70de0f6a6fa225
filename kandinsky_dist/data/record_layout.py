"""What a record of encoder outputs consists of, byte for byte, and the memory that a batch of them goes to.

Parts of one shape lie one behind the other, then rows of one width, of which a record has as many as its
length says, then a seal. Nothing has to be parsed: each part goes straight into its row of a batch's tensor.

Letters of shapes: B samples, L rows, D their width, W 8-byte words.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]
Uint64s = npt.NDArray[np.uint64]

WORD_BYTES = 8
"""Of a seal; the length of a part, and of a row, is a multiple of it."""
_SEAL_OF_NOTHING = np.uint64(0x9E3779B97F4A7C15)
"""So that a record of zeros, as a hole in a file reads, has no valid seal."""


@dataclass(frozen=True)
class RecordLayout:
    """The parts of a record.

    Attributes:
        dtype: of all of them.
        shapes: name -> shape of a sample's part, in the order in which they lie.
        rows: name and width of what a record has several of, or None.
        max_rows: a record has 1 to so many.
    """

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    rows: tuple[str, int] | None = None
    max_rows: int = 0

    def __post_init__(self) -> None:
        assert all(size % WORD_BYTES == 0 for size in (*self.part_bytes, self.row_bytes)), self

    @cached_property
    def part_bytes(self) -> tuple[int, ...]:
        """Length of each part."""
        return tuple(math.prod(shape) * self.dtype.itemsize for shape in self.shapes.values())

    @cached_property
    def row_bytes(self) -> int:
        """Length of a row, 0 where there are none."""
        return self.rows[1] * self.dtype.itemsize if self.rows else 0

    def record_bytes(self, num_rows: int = 0) -> int:
        """Length of a record with so many rows."""
        return sum(self.part_bytes) + num_rows * self.row_bytes + WORD_BYTES

    def num_rows(self, sizes_B: Int64s) -> Int64s:
        """Rows of records of these lengths; -1 where no record has such a length."""
        rest_B = sizes_B - self.record_bytes()
        if not self.row_bytes:
            return np.where(rest_B == 0, 0, -1)
        rows_B, over_B = np.divmod(rest_B, self.row_bytes)
        return np.where((over_B == 0) & (rows_B >= 1) & (rows_B <= self.max_rows), rows_B, -1)

    def records(self, tensors: Mapping[str, Tensor], num_rows: Sequence[int] | None = None) -> list[bytes]:
        """The records of some samples.

        Args:
            tensors: (B, ...) on the CPU, of the layout's type; rows (B, L, D), of which the first count.
            num_rows: of each sample.
        """
        arrays = [_words(tensors[name]) for name in self.shapes]
        found = []
        for sample in range(len(next(iter(tensors.values())))):
            parts = [array[sample] for array in arrays]
            if self.rows:
                assert num_rows is not None
                parts.append(_words(tensors[self.rows[0]][sample, : num_rows[sample]][None])[0])
            words_W = np.concatenate(parts)
            found.append(words_W.tobytes() + seals([words_W[None].sum(1)]).tobytes())
        return found


class Sheet:
    """Memory of a batch's records.

    Attributes:
        tensors: by name (B, ...); rows are (B, L, D), with zeros behind those that a sample has.
        num_rows_B: int64.
        seals_B: as read.
    """

    def __init__(self, layout: RecordLayout, num_rows_B: Int64s, *, pin_memory: bool = False) -> None:
        self.layout = layout
        self.num_rows_B = num_rows_B
        num = len(num_rows_B)
        self.tensors = {
            name: torch.empty(num, *shape, dtype=layout.dtype, pin_memory=pin_memory)
            for name, shape in layout.shapes.items()
        }
        if layout.rows:
            name, width = layout.rows
            shape = num, max(num_rows_B.tolist(), default=0), width
            self.tensors[name] = torch.zeros(shape, dtype=layout.dtype, pin_memory=pin_memory)
        self.seals_B = np.empty(num, np.uint64)

    def __len__(self) -> int:
        return len(self.num_rows_B)

    def buffers(self) -> list[tuple[Any, ...]]:
        """Of each sample, the pieces of memory (uint8) that its record's bytes go to, one after the other."""
        # Arrays, not memoryviews: Python's garbage collector does not look at arrays.
        columns: list[Iterable[Uint8s]] = [_bytes(self.tensors[name]) for name in self.layout.shapes]
        if self.layout.rows:
            name = self.layout.rows[0]
            ends = (self.num_rows_B * self.layout.row_bytes).tolist()
            columns.append(row[:end] for row, end in zip(_bytes(self.tensors[name]), ends, strict=True))
        columns.append(self.seals_B.view(np.uint8).reshape(-1, WORD_BYTES))
        return list(zip(*columns, strict=True))

    def fill(self, records: Sequence[bytes]) -> None:
        """Takes each sample's record, which is of the length that the sheet was made for."""
        for record, buffers in zip(records, self.buffers(), strict=True):
            start = 0
            for buffer in buffers:
                buffer[:] = np.frombuffer(record, np.uint8, len(buffer), start)
                start += len(buffer)

    def add_up(self, start: int, end: int) -> None:
        """Takes the sums of samples `start` to before `end`, best while they are still in a core's cache."""
        for words_BW, sums_B in zip(self._words, self._sums, strict=True):
            np.add.reduce(words_BW[start:end], 1, out=sums_B[start:end])

    def broken_seals(self) -> list[int]:
        """Samples that have been added up whose bytes are not those that were sealed.

        Zeros behind the rows change no seal.
        """
        return np.flatnonzero(seals(self._sums) != self.seals_B).tolist()

    @cached_property
    def _words(self) -> list[Uint64s]:
        return [_words(tensor) for tensor in self.tensors.values()]

    @cached_property
    def _sums(self) -> list[Uint64s]:
        return [np.empty(len(self), np.uint64) for _ in self.tensors]

    def put(self, sample: int, other: "Sheet") -> None:
        """Takes the first record of another sheet for a sample, however many rows it has."""
        num_rows = int(other.num_rows_B[0])
        for name, tensor in self.tensors.items():
            if self.layout.rows and name == self.layout.rows[0]:
                if num_rows > tensor.shape[1]:
                    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, num_rows - tensor.shape[1]))
                    self.tensors[name] = tensor
                tensor[sample] = 0
                tensor[sample, :num_rows] = other.tensors[name][0]
            else:
                tensor[sample] = other.tensors[name][0]
        self.num_rows_B[sample], self.seals_B[sample] = num_rows, other.seals_B[0]


def seals(sums: Sequence[Uint64s]) -> Uint64s:
    """The last word of records, given sums (B,) of each part's words: a constant and their sum mod 2^64."""
    total_B = np.full(len(sums[0]), _SEAL_OF_NOTHING)
    for sums_B in sums:
        total_B += sums_B
    return total_B


def _words(tensor: Tensor) -> Uint64s:
    """The bytes of each sample as 8-byte words (B, W)."""
    return _bytes(tensor.contiguous()).view(np.uint64)


def _bytes(tensor: Tensor) -> Uint8s:
    """Memory of each sample (B, bytes)."""
    array = tensor.view(torch.uint8).numpy()
    return array.reshape(len(array), math.prod(array.shape[1:]))  # of no rows too
