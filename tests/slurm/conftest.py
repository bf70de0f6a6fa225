"""Clusters for the tests of this folder; without root or Slurm these tests are skipped, with the reason."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, why_unavailable

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm_available() -> None:
    """Skips the test where no cluster can be started."""
    if reason := why_unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(slurm_available: None) -> Iterator[Cluster]:
    """Two nodes with two GPUs each, as far as Slurm knows."""
    with Cluster(num_nodes=2, gpus_per_node=2) as running:
        yield running


@pytest.fixture(scope="module")
def four_nodes(slurm_available: None) -> Iterator[Cluster]:
    """Four nodes with two GPUs each, as far as Slurm knows."""
    with Cluster(num_nodes=4, gpus_per_node=2) as running:
        yield running


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, which jobs are submitted from."""
    return REPOSITORY
