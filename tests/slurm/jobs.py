"""Jobs of tiny networks on a test cluster, and the single process that their losses are compared with."""

import sys
from collections.abc import Mapping
from pathlib import Path

from cluster import Cluster
from helpers import forked
from helpers.command import losses, train_arguments

RANKS_PER_NODE = 2
PRIOR_STEPS = 3
"""Of the reference run that several tests share."""
SETTINGS = (
    "parallel.precision=fp32",
    # The job's recipe has a schedule; the process it is compared with starts from the defaults.
    "optim.lr_scheduler=constant",
    "optim.lr_warmup_steps=0",
)


class Jobs:
    """Jobs of slurm/STAGE.sbatch, submitted from the checkout.

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
        ranks_per_node: int = RANKS_PER_NODE,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a run with eight samples a step; return the job's id."""
        _, _, *words = train_arguments(
            stage,
            *SETTINGS,
            f"data.micro_batch_size={8 // (num_nodes * ranks_per_node)}",
            *settings,
            models=self.models,
            corpus=self.corpus,
            run_dir=run_dir,
            strategy=strategy,
        )
        script = str(self.repository / "slurm" / f"{stage}.sbatch")
        return self.cluster.sbatch(
            [f"--nodes={num_nodes}", f"--gpus-per-node={ranks_per_node}", *options, script, *words],
            env={
                "KANDINSKY_CONFIG": f"{stage}_tiny",
                "VIRTUAL_ENV": sys.prefix,
                "OMP_NUM_THREADS": "1",
                **(environment or {}),
            },
            cwd=self.repository,
        )

    def completed(self, job: int, *, timeout: float = 500) -> str:
        """Wait for a job that must end well; return what it printed."""
        fields = self.cluster.wait(job, timeout=timeout)
        assert fields["JobState"] == "COMPLETED", self.cluster.output(job)
        return self.cluster.output(job)

    def undisturbed_losses(self, stage: str, run_dir: Path, *settings: str) -> list[float]:
        """Return the losses of the same run in one process that nothing happens to."""
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
