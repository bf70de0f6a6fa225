"""Samples of a run's order, read from a storage; a damaged one is replaced by a rule, not by chance.

Letters of shapes: B samples.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.data.order import NUM_ATTEMPTS, Order, Places
from kandinsky_dist.data.rows import Rows, Views
from kandinsky_dist.data.storage import Storage
from kandinsky_dist.errors import DataError, SampleError


class ShardDataset:
    """What a run is trained on: which samples, from where, seen how."""

    def __init__(self, order: Order, views: Views, storage: Storage) -> None:
        self.order = order
        self.views = views
        self.storage = storage

    def batch(self, positions: Sequence[int]) -> Batch:
        """Reads, decodes and tokenizes the samples at some positions.

        Raises:
            DataError: as `Assembly.fill`.
        """
        positions_B = np.asarray(positions, np.int64)
        assembly = Assembly(self, positions_B, self.order.locate(positions_B))
        for row in range(len(assembly)):
            assembly.fill(row)
        return assembly.finish()


class Assembly:
    """A batch on its way from the storage: rows in any order and by several threads, then `finish`."""

    def __init__(self, dataset: ShardDataset, positions_B: npt.NDArray[np.int64], places: Places) -> None:
        (aspect,) = set(places.aspects_B.tolist())  # the order gives a global batch of one bucket
        self._dataset = dataset
        self._places = places.each()
        self._rows = Rows(dataset.views, positions_B, aspect)
        self._bad: dict[int, list[BadSample]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def fill(self, row: int) -> None:
        """Reads and decodes one sample; a damaged one is replaced by the order's next attempt.

        Raises:
            DataError: the storage fails, or replacement after replacement is damaged too.
        """
        order, storage = self._dataset.order, self._dataset.storage
        position = int(self._rows.positions_B[row])
        place, failures = self._places[row], list[str]()
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                (place,) = order.locate([position], attempt).each()
            try:
                sample = storage.read(place, self._dataset.views.extensions)
                name = order.manifest.name(place.shard, sample.key)
                self._rows.put(row, sample, name)
            except SampleError as error:
                failures.append(str(error))
                continue
            self._bad[row] = [BadSample(position, failure, name) for failure in failures]
            return
        raise DataError(
            f"{NUM_ATTEMPTS} samples in a row cannot be used, at position {position}, first {failures[0]}; "
            "kandinsky-dist data check says what is wrong with the corpus"
        )

    def finish(self) -> Batch:
        """The batch, every row of which has been filled."""
        return self._rows.finish([bad for row in sorted(self._bad) for bad in self._bad[row]])
