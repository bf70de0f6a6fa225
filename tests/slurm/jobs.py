"""Jobs of tiny networks on a test cluster, and the single process that their losses are compared with."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster import Cluster
from helpers import forked
from helpers.command import losses, train_arguments

RANKS_PER_NODE = 2
SETTINGS = (
    "parallel.precision=fp32",
    # The job's recipe has a schedule; the process it is compared with starts from the defaults.
    "optim.lr_scheduler=constant",
    "optim.lr_warmup_steps=0",
)
CAMPAIGN = "KANDINSKY_DIST_CAMPAIGN" in os.environ


class Jobs:
    """Submits slurm/STAGE.sbatch from the checkout.

    Args:
        models: folder of prior/ and decoder/.
        corpus: folder of train/ and validation/.
    """

    def __init__(self, cluster: Cluster, repository: Path, models: Path, corpus: Path):
        self.cluster = cluster
        self.repository = repository
        self.models = models
        self.corpus = corpus

    def submit(
        self,
        stage: str,
        run_dir: Path,
        *settings: str,
        strategy: str = "ddp",
        num_nodes: int = 2,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Submits a run on nodes of two ranks each, eight samples a step; returns the job's id."""
        _, _, *words = train_arguments(
            stage,
            *SETTINGS,
            f"data.micro_batch_size={8 // (num_nodes * RANKS_PER_NODE)}",
            *settings,
            models=self.models,
            corpus=self.corpus,
            run_dir=run_dir,
            strategy=strategy,
        )
        script = str(self.repository / "slurm" / f"{stage}.sbatch")
        return self.cluster.sbatch(
            [f"--nodes={num_nodes}", f"--gpus-per-node={RANKS_PER_NODE}", *options, script, *words],
            env={
                "KANDINSKY_CONFIG": f"{stage}_tiny",
                "VIRTUAL_ENV": sys.prefix,
                "OMP_NUM_THREADS": "1",
                **(environment or {}),
            },
            cwd=self.repository,
        )

    def completed(self, job: int, *, timeout: float = 300) -> str:
        """Waits for a job that must end well; returns what it printed."""
        fields = self.cluster.wait(job, timeout=timeout)
        assert fields["JobState"] == "COMPLETED", self.cluster.output(job)
        return self.cluster.output(job)

    def undisturbed_losses(self, stage: str, run_dir: Path, *settings: str) -> list[float]:
        """Losses of the same run in one process that nothing happens to."""
        done = forked.train(
            stage,
            *SETTINGS,
            "data.micro_batch_size=2",
            *settings,
            models=self.models,
            corpus=self.corpus,
            run_dir=run_dir,
        )
        assert done.returncode == 0, done.stderr
        return losses(run_dir)
