import signal
import sys
from pathlib import Path

import pytest
from helpers.command import losses, metrics, train, train_arguments

pytestmark = pytest.mark.slurm

STEPS = 4
SETTINGS = (
    "data.micro_batch_size=2",  # 8 samples a step: two a rank on four ranks, four times two on one
    "parallel.precision=fp32",
    # The job's recipe has a schedule; the process it is compared with starts from the defaults.
    "optim.lr_scheduler=constant",
    "optim.lr_warmup_steps=0",
)


@pytest.fixture
def submit(cluster, repository, tiny_models, small_corpus):
    """Submits slurm/STAGE.sbatch over two nodes of two ranks and returns the job's id."""

    def submit(stage: str, run_dir: Path, *settings: str, strategy: str = "ddp") -> int:
        _, _, *words = train_arguments(
            stage,
            *SETTINGS,
            *settings,
            models=tiny_models,
            corpus=small_corpus,
            run_dir=run_dir,
            strategy=strategy,
        )
        return cluster.sbatch(
            ["--nodes=2", "--gpus-per-node=2", str(repository / "slurm" / f"{stage}.sbatch"), *words],
            env={"KANDINSKY_CONFIG": f"{stage}_tiny", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
            cwd=repository,
        )

    return submit


@pytest.mark.parametrize(("stage", "strategy"), [("prior", "zero2"), ("decoder", "ddp")])
def test_two_nodes_of_two_ranks_lose_what_one_process_loses(
    stage, strategy, cluster, submit, tiny_models, small_corpus, tmp_path
):
    length = f"run.max_steps={STEPS}"
    job = submit(stage, tmp_path / "four", length, strategy=strategy)
    alone = train(
        stage,
        *SETTINGS,
        length,
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "one",
    )
    assert alone.returncode == 0, alone.stderr
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    assert losses(tmp_path / "four") == pytest.approx(expected, abs=1e-5), cluster.output(job)


def test_a_signal_to_the_batch_shell_stops_with_75_and_the_same_command_finishes(cluster, submit, tmp_path):
    num_steps = 40
    job = submit("prior", tmp_path / "run", f"run.max_steps={num_steps}")
    cluster.wait_output(job, "step 1/", timeout=300)
    cluster.signal(job, signal.SIGUSR1, batch=True)
    cluster.wait(job, timeout=120)
    assert cluster.exit_code(job) == 75, cluster.output(job)
    assert 1 <= len(metrics(tmp_path / "run")) < num_steps

    job = submit("prior", tmp_path / "run", f"run.max_steps={num_steps}")
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    steps = [entry["step"] for entry in metrics(tmp_path / "run")]
    assert steps == list(range(1, num_steps + 1)), "every step once, none repeated or left out"


def test_a_mistake_in_the_settings_ends_the_job_with_78_and_its_line(cluster, submit, tmp_path):
    job = submit("decoder", tmp_path / "run", "data.global_batch_size=6")
    cluster.wait(job, timeout=120)
    assert cluster.exit_code(job) == 78, cluster.output(job)
    assert "data.global_batch_size=6 must be a multiple" in cluster.output(job)
