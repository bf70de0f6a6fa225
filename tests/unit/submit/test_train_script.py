"""slurm/train.sh without a cluster: what it gives srun, and what it refuses."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
ALLOCATION = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_GPUS_ON_NODE": "8",
    "KANDINSKY_PREFLIGHT": "0",  # there are no nodes to look at
}


@pytest.fixture
def train_script(tmp_path):
    """Runs the script with an srun that says what it was given, one word a line."""
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'n0\\nn1\\n'\n")
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\n'
        'echo "master ${MASTER_ADDR-}:${MASTER_PORT-}"; echo "threads ${OMP_NUM_THREADS-}"\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(REPOSITORY / "slurm" / "train.sh"), "prior", "--data.shards=/my shards"],
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **ALLOCATION, **environment},
        )

    return run


def test_one_task_a_node_starts_its_ranks(train_script):
    words = train_script().stdout.splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(words)
    assert words[-8:] == [
        str(REPOSITORY / "launch" / "node.sh"),
        *("train", "prior", "--config", "prior_full", "--data.shards=/my shards"),
        *("master :", "threads "),
    ]


def test_one_task_a_rank_knows_where_to_meet(train_script):
    words = train_script(KANDINSKY_TASKS="rank").stdout.splitlines()
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=8"} <= set(words)
    assert words[-8:] == [
        str(REPOSITORY / "launch" / "rank.sh"),
        *("train", "prior", "--config", "prior_full", "--data.shards=/my shards"),
        *("master n0:20007", "threads 8"),
    ]


def test_more_ranks_than_cores_have_one_each(train_script):
    words = train_script(
        KANDINSKY_TASKS="rank", NPROC_PER_NODE="2", SLURM_CPUS_ON_NODE="1"
    ).stdout.splitlines()
    assert {"--ntasks-per-node=2", "--cpus-per-task=1", "threads 1"} <= set(words)


def test_options_of_srun_are_quoted_and_never_run(train_script):
    words = train_script(
        KANDINSKY_SRUN="--mpi=none --comment='a  $(id) `id`' \"--x=it's\""
    ).stdout.splitlines()
    assert words[words.index("--mpi=none") :][:3] == ["--mpi=none", "--comment=a  $(id) `id`", "--x=it's"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"KANDINSKY_SRUN": "--comment='a"}, "close its quotes"),
        ({"KANDINSKY_TASKS": "gpu"}, "KANDINSKY_TASKS=gpu is neither node nor rank"),
        ({"KANDINSKY_TASKS": "rank", "MAX_RESTARTS": "2"}, "need KANDINSKY_TASKS=node"),
        ({"KANDINSKY_TASKS": "rank", "MIN_NODES": "1"}, "need KANDINSKY_TASKS=node"),
    ],
)
def test_what_cannot_work_ends_with_78(train_script, environment, said):
    done = train_script(**environment)
    assert done.returncode == 78
    assert said in done.stderr.splitlines()[-1]
    assert done.stdout == ""
