from collections.abc import Callable
from pathlib import Path

import pytest
from data_tars import sample, write_tar

from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.manifest import Manifest


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Manifest]:
    """make_corpus([3, 0, 5]) -> an indexed folder of shards of these sizes."""

    def make(sizes: list[int], folder: str = "corpus", **replaced: bytes) -> Manifest:
        number = 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                members += sample(number, **replaced)
                number += 1
            write_tar(tmp_path / folder / f"train-{shard:03d}.tar", members)
        return index_shards(str(tmp_path / folder), progress=False)

    return make
