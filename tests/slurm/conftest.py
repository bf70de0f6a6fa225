"""Cluster and jobs for the tests of this folder; without root or Slurm they are skipped, with the reason."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, why_unavailable
from jobs import PRIOR_STEPS, Jobs

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
def prior_losses(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], list[float]]:
    """Return a function for the losses of the prior's first steps in one process.

    Jobs with `jobs.SETTINGS` have the same. Tests submit their jobs first: these start meanwhile.
    """

    @cache
    def measured() -> list[float]:
        run_dir = tmp_path_factory.mktemp("one") / "run"
        return jobs.undisturbed_losses("prior", run_dir, f"run.max_steps={PRIOR_STEPS}")

    return measured
