"""`kandinsky-dist submit` and slurm/pipeline.sh, as a user at the head of a cluster gives them."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from cluster import SlurmError
from helpers.command import losses, train_arguments
from jobs import SETTINGS as SAME

pytestmark = pytest.mark.slurm

# 8 samples a step: two a rank on four ranks, four times two on one.
SETTINGS = (*SAME, "data.micro_batch_size=2")
LATE = 500
NAME = 'it\'s $HOME # a \\ and "two"'


@pytest.fixture(scope="module")
def submit(cluster, repository, tiny_models, small_corpus):
    """Return a function that submits a training of the prior over four ranks and returns the job's id."""

    def submit(
        run_dir: Path,
        *options: str,
        num_nodes: int = 2,
        settings: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> int:
        _, stage, *words = train_arguments(
            "prior",
            *SETTINGS,
            *settings,
            models=tiny_models,
            corpus=small_corpus,
            run_dir=run_dir,
            strategy="fsdp2",
        )
        job = (
            f"--nodes={num_nodes}",
            f"--gpus-per-node={4 // num_nodes}",
            "--config=prior_tiny",
            f"--venv={sys.prefix}",
        )
        log = f"--output={cluster.root}/log/job-%j.out"
        command = [sys.executable, "-m", "kandinsky_dist", "submit", stage, *job, log, *options, *words]
        said = cluster.run(
            command, env={"OMP_NUM_THREADS": "1", **(environment or {})}, cwd=repository
        ).splitlines()
        number = int(said[0].removeprefix("job "))
        assert said[1] == f"log {cluster.root}/log/job-{number}.out"
        return number

    return submit


def test_a_task_a_node_and_a_task_a_rank_lose_what_one_process_loses(cluster, submit, prior_losses, tmp_path):
    """The first on four nodes of one rank; the second on two of two, after their network is measured."""
    a_node = submit(tmp_path / "node", "--job-name", NAME, "--srun", "cpu-bind=none", num_nodes=4)
    a_rank = submit(
        tmp_path / "rank",
        *("--tasks-per-node", "rank", "--srun=--label"),
        environment={"KANDINSKY_MIN_GB_S": "1e-6"},
    )
    expected = prior_losses()[:2]  # while the jobs start
    assert f"JobName={NAME}\n" in cluster.run(["scontrol", "show", "job", str(a_node)])
    for job in (a_node, a_rank):
        fields = cluster.wait(job, timeout=LATE)
        assert (fields["JobState"], fields["Requeue"]) == ("COMPLETED", "1"), cluster.output(job)
    assert "preflight: 4 nodes fit" in cluster.output(a_node)
    assert re.search(r"preflight: 2 nodes fit, 0 GPUs, all-reduce at \S+ GB/s", cluster.output(a_rank))
    assert "0: step 1/2" in cluster.output(a_rank), "srun was not given its option"
    assert len(list((tmp_path / "rank" / "audit").glob("rank_*.jsonl"))) == 4
    assert losses(tmp_path / "node") == pytest.approx(expected, abs=1e-5), cluster.output(a_node)
    # Of four ranks both: the same sums in the same order.
    assert losses(tmp_path / "rank") == losses(tmp_path / "node"), cluster.output(a_rank)


def test_a_refusal_leaves_nothing_in_the_queue(cluster, submit, tmp_path):
    before = cluster.run(["squeue", "--noheader", "--format=%i"]).split()
    with pytest.raises(SlurmError, match="sbatch refused the job: sbatch: error: invalid partition"):
        submit(tmp_path / "run", "--partition=nowhere")
    with pytest.raises(SlurmError, match="must be a multiple"):
        submit(tmp_path / "run", settings=("data.global_batch_size=6",))
    assert set(cluster.run(["squeue", "--noheader", "--format=%i"]).split()) <= set(before)


def test_a_pipeline_goes_from_shards_to_a_picture(cluster, repository, tiny_models, small_corpus, tmp_path):
    run_dir = tmp_path / "a run"
    settings = (
        *SETTINGS,
        f"model.prior={tiny_models / 'prior'}",
        f"model.decoder={tiny_models / 'decoder'}",
        "run.max_steps=2",
        "data.global_batch_size=8",
        "data.num_workers=0",
        "telemetry.report_to=[]",
        "telemetry.log_every_steps=1",
    )
    said = cluster.run(
        [
            str(repository / "slurm" / "pipeline.sh"),
            *("--shards", str(small_corpus / "validation")),
            *("--run-dir", str(run_dir), "--nodes", "1", "--gpus-per-node=1"),
            *("--config-prior", "prior_tiny", "--config-decoder", "decoder_tiny"),
            *(f"--set={setting}" for setting in settings),
            *("--prompt", 'it\'s a "test"', "--image-size", "64"),
        ],
        env={"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "KANDINSKY_PREFLIGHT": "0"},
        cwd=tmp_path,
    )
    jobs = dict(line.split() for line in said.splitlines()[:-1])
    assert len(jobs) == 7, said
    for name, number in jobs.items():
        fields = cluster.wait(int(number), timeout=LATE)
        log = run_dir / "logs" / f"kandinsky-{name}-{number}.log"
        assert fields["JobState"] == "COMPLETED", log.read_text() if log.exists() else fields
    for stage in ("prior", "decoder"):
        assert len(losses(run_dir / stage)) == 2
    assert (run_dir / "sample.png").read_bytes().startswith(b"\x89PNG")
