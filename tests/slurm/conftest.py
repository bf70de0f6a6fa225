"""Cluster and jobs for the tests of this folder, which are skipped, with the reason, without root or Slurm."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, why_unavailable
from jobs import Jobs

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm_available() -> None:
    """Skip the test where no cluster can be started."""
    if reason := why_unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_available: None) -> Iterator[Cluster]:
    """Four nodes for all tests, with GPUs for two jobs at a time as far as Slurm knows."""
    with Cluster(num_nodes=4, gpus_per_node=4) as running:
        yield running


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout, which jobs are submitted from."""
    return REPOSITORY


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, repository: Path, tiny_models: Path, small_corpus: Path) -> Jobs:
    """Jobs of tiny networks on the cluster."""
    return Jobs(cluster, repository, tiny_models, small_corpus)


@pytest.fixture(scope="session")
def prior_losses(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the prior's first steps in one process; jobs with `jobs.SETTINGS` have the same."""
    return jobs.undisturbed_losses("prior", tmp_path_factory.mktemp("one") / "run", "run.max_steps=3")
