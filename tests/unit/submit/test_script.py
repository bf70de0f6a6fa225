"""A job's file: its text, and that the shell and Slurm read back what was asked for."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.submit.script import Job, render, sbatch_quote

EXPECTED = """\
#!/bin/bash
#SBATCH --job-name=kandinsky-prior
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --partition=gpu
#SBATCH "--comment=a # b"
# Trains the prior on 4 x 8 GPUs. Made by kandinsky-dist submit.
set -euo pipefail
export NCCL_DEBUG='INFO WARN'
export PYTHONPATH=/code${PYTHONPATH:+:$PYTHONPATH}
export VIRTUAL_ENV='/my env'
export PATH=$VIRTUAL_ENV/bin:$PATH
export KANDINSKY_COMMAND=train
export KANDINSKY_CONFIG=prior_full
export KANDINSKY_TASKS=node
export KANDINSKY_SRUN='--cpu-bind=none --mpi=none'
export NPROC_PER_NODE=8
exec /code/slurm/train.sh prior --data.shards '/data/my shards' --run.dir /runs/prior
"""

JOB = {"command": "train", "stage": "prior", "config": "prior_full", "name": "kandinsky-prior"}

# What a line can hold, with what shells care about more often than chance would have it.
hostile = st.text(
    st.one_of(
        st.sampled_from("'\"\\$`!#;&|<>(){}[]*?~=%: \t-"),
        st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")),
    ),
    min_size=1,
    max_size=20,
).filter(lambda text: text.isprintable() and text.strip())


def test_the_file_is_this_text():
    job = Job(
        **JOB,
        checkout=Path("/code"),
        nodes=4,
        words=["--data.shards", "/data/my shards", "--run.dir", "/runs/prior"],
        sbatch=["--partition=gpu", "--comment=a # b"],
        srun=["--cpu-bind=none", "--mpi=none"],
        environment={"NCCL_DEBUG": "INFO WARN"},
        venv="/my env",
    )
    assert render(job) == EXPECTED


def test_one_task_a_rank_is_asked_for_in_the_header_too():
    text = render(Job(**JOB, checkout=Path("/code"), nodes=2, gpus_per_node=4, tasks="rank"))
    assert "#SBATCH --ntasks-per-node=4\n" in text
    assert "export KANDINSKY_TASKS=rank\n" in text


@pytest.fixture(scope="module")
def echoing(tmp_path_factory) -> Path:
    """A checkout, in a folder with a hard name, whose train.sh says what it was given."""
    checkout = tmp_path_factory.mktemp("it's $HOME `x`")
    (checkout / "slurm").mkdir()
    script = checkout / "slurm" / "train.sh"
    script.write_text(
        "#!/bin/bash\n"
        'printf "%s\\0" "$#" "$@" "$KANDINSKY_CONFIG" "$VIRTUAL_ENV" "$A" "${PYTHONPATH%%:*}"\n'
        "xargs -r printf '%s\\0' <<<\"$KANDINSKY_SRUN\"\n"  # as the real train.sh takes it apart
    )
    script.chmod(0o755)
    return checkout


@examples(40)
@given(words=st.lists(hostile, max_size=3), srun=st.lists(hostile, max_size=3), value=hostile)
def test_whatever_is_asked_for_arrives_as_it_is(echoing, words, srun, value):
    job = Job(
        **{**JOB, "config": value, "name": value},
        checkout=echoing,
        words=words,
        output=value,
        sbatch=[f"--comment={value}"],
        srun=srun,
        environment={"A": value},
        venv=value,
    )
    text = render(job)
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0
    done = subprocess.run(
        ["bash"], input=text.encode(), capture_output=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0, done.stderr
    arrived = done.stdout.decode().split("\0")[:-1]
    assert arrived == [str(len(words) + 1), "prior", *words, value, value, value, str(echoing), *srun]


@examples(200)
@given(word=hostile)
def test_the_header_is_read_back_as_sbatch_reads_it(word):
    assert _as_sbatch(f" {sbatch_quote(word)} ") == [word]


def _as_sbatch(line: str) -> list[str]:
    """How Slurm's sbatch takes a line of options apart."""
    words, word, quote, escaped = [], None, "", False
    for char in line:
        if char in " \t" and not quote:  # even behind a backslash
            words += [] if word is None else [word]
            word = None
        elif escaped:
            word, escaped = (word or "") + char, False
        elif char == "\\":
            word, escaped = word or "", True
        elif quote:
            word, quote = (word or "", "") if char == quote else ((word or "") + char, quote)
        elif char in "'\"":
            word, quote = word or "", char
        elif char == "#":
            break
        else:
            word = (word or "") + char
    return words + ([] if word is None else [word])
