"""slurm/pipeline.sh without a cluster: the chain that it prints, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
WORDS = ("--shards", "/data/my shards", "--run-dir", "/runs/k", "--set", "parallel.strategy=ddp")


def pipeline(*words, **environment):
    command = [str(REPOSITORY / "slurm" / "pipeline.sh"), *words]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def queue(tmp_path) -> Path:
    """A folder with an sbatch that notes its words a line and answers with the line's number, and scancel."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/bash\nprintf "%s|" "$@" >>"$QUEUE"; echo >>"$QUEUE"; number=$(wc -l <"$QUEUE")\n'
        '[ "$number" -lt "${REFUSED:-99}" ] || exit 1\necho "$number;big"\n'
    )
    (tmp_path / "scancel").write_text('#!/bin/bash\necho "scancel $*" >>"$QUEUE"\n')
    for name in ("sbatch", "scancel"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run_on(queue, *words, **environment):
    done = pipeline(
        *WORDS,
        *("--run-dir", str(queue / "run")),
        *words,
        PATH=f"{queue}:{os.environ['PATH']}",
        QUEUE=str(queue / "queue"),
        **environment,
    )
    return done, (queue / "queue").read_text().splitlines()


def test_what_dry_run_prints_queues_the_same_jobs(queue):
    words = ("--validation-shards", "/val", "--set", "validation.every_steps=5", "--prompt", "it's $HOME")
    done, jobs = run_on(queue, *words)
    assert done.returncode == 0, done.stderr
    (queue / "queue").unlink()
    printed = pipeline(*WORDS, "--run-dir", str(queue / "run"), *words, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    environment = {**os.environ, "PATH": f"{queue}:{os.environ['PATH']}", "QUEUE": str(queue / "queue")}
    subprocess.run(["bash", "-eu"], input=printed.stdout, text=True, env=environment, check=True)
    again = (queue / "queue").read_text().splitlines()
    assert [sorted(job.split("|")) for job in again] == [sorted(job.split("|")) for job in jobs]
    assert len(jobs) == 9


def test_each_job_waits_for_what_it_reads(queue):
    done, jobs = run_on(queue, "--nodes", "2", "--sbatch", "partition=gpu")
    assert done.returncode == 0, done.stderr
    waits = [[word for word in job.split("|") if word.startswith("--dependency")] for job in jobs]
    assert waits == [
        [],  # precompute-prior
        ["--dependency=afterok:1"],  # train-prior
        ["--dependency=afterok:2"],  # export-prior
        [],  # precompute-decoder
        ["--dependency=afterok:4"],
        ["--dependency=afterok:5"],
        ["--dependency=afterok:3:6"],  # generate
    ]
    assert all(
        ("--kill-on-invalid-dep=yes" in job) == bool(waited) for job, waited in zip(jobs, waits, strict=True)
    )
    assert all("|--partition=gpu|" in job for job in jobs)
    assert f"--data.source=cached|--data.shards={queue}/run/cache/prior|" in jobs[1]
    assert [line.split() for line in done.stdout.splitlines()][:2] == [
        ["precompute-prior", "1"],
        ["train-prior", "2"],
    ]


def test_a_refusal_on_the_way_leaves_no_half_of_a_chain(queue):
    done, jobs = run_on(queue, REFUSED="4")
    assert done.returncode == 78
    assert "sbatch refused precompute-decoder" in done.stderr
    assert jobs[-1] == "scancel 1 2 3"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "3"), "data.global_batch_size=2048 must be a multiple"),
        (("--run-dir", "runs"), "--run-dir=runs must be an absolute path"),
        (("--shards", ""), "--shards is not set"),
        (("--set-decoder", "data.resolutoin=256"), "did you mean data.resolution"),
        (("--node", "3"), "--node is no option"),
        (("--prompt",), "--prompt is no option or needs a value"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    done = pipeline(*WORDS, *words, "--dry-run")
    assert done.returncode == 78
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_exported_networks_are_not_taken_for_this_chains(tmp_path):
    (tmp_path / "export").mkdir()
    done = pipeline(*WORDS, "--run-dir", str(tmp_path), "--dry-run")
    assert done.returncode == 78
    assert "remove it, or choose another --run-dir" in done.stderr
