"""A run of several nodes that things happen to, one after the other, and that comes back by itself."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cluster import Cluster
from helpers.command import DEFAULTS, keys, losses, metrics
from jobs import RANKS_PER_NODE, SETTINGS

from kandinsky_dist.bench.fault_kinds import (
    TIME_LIMIT,
    Fault,
    ask_to_stop,
    kill_rank,
    kill_worker,
    move_to,
    requeue,
    stop_rank,
)
from kandinsky_dist.bench.faults import STRETCH_STEPS, Request, run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3000)]

FAST = (
    Fault("SIGKILL of a rank", kill_rank),
    Fault("SIGKILL of a rank's data workers", kill_worker, restarts=False),
    Fault("USR1 to the batch shell", ask_to_stop),
)

NUM_ROUNDINGS = 10
"""That a loss may be off by: the distance of two runs that nothing happens to, or a rounding near 1."""
LEARNING_RATE = 1e-4
"""Lower than elsewhere: at that one training amplifies roundings until they would hide what a fault does."""
LEFT_BYTES = 200_000
"""On the full disk: enough for lines of logs, not for a checkpoint."""


@pytest.fixture(scope="module")
def small_disk(slurm_available, tmp_path_factory):
    """Mount a small disk for the run, before the nodes boot, so that they have it too."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def cluster_with_disk(small_disk):
    """Start four nodes that have the small disk and that this module may break."""
    with Cluster(num_nodes=4, gpus_per_node=RANKS_PER_NODE) as running:
        yield running


def fill(job, _dice):
    """Fill the disk of the run, from one moment to the next."""
    folder = job.output.parent
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - LEFT_BYTES)


def make_room(job):
    (job.output.parent / "filler").unlink()


def node_faults(cluster):
    """Return the faults that only the owner of the cluster can cause."""
    chosen = []

    def any_node(job, dice):
        chosen.append(dice.choice(sorted({beat.host for beat in job.beats().values()})))
        return chosen[-1]

    def power_off(job, dice):
        cluster.power_off(any_node(job, dice))

    def power_on(job):
        job.wait(lambda: job.state != "RUNNING", "be requeued")
        cluster.boot(chosen[-1])

    def cut(job, dice):
        cluster.set_link(any_node(job, dice), up=False)

    def mend(job):
        job.wait(lambda: job.state != "RUNNING", "be requeued")
        cluster.set_link(chosen[-1], up=True)

    def kill_daemon(job, dice):
        cluster.kill_daemon(any_node(job, dice))

    def start_daemon(job):
        job.wait(lambda: job.state != "RUNNING", "be requeued")
        cluster.start_daemon(chosen[-1])

    def preempt(job, _dice):
        job.call(
            ["sbatch", "--partition=high", f"--nodes={cluster.num_nodes}", "--exclusive", "--wrap=sleep 5"]
        )

    return (
        Fault("a node loses its power", power_off, heal=power_on),
        Fault("a node's network is cut", cut, heal=mend),
        Fault("SIGKILL of a node's slurmd", kill_daemon, heal=start_daemon),
        Fault("preemption", preempt),
    )


def struck(
    out,
    faults,
    *,
    cluster,
    repository,
    models,
    corpus,
    num_nodes,
    ranks_per_node,
    options=(),
    environment=None,
    command="",
    **watchdog,
):
    """Run faults on a job; return the rows of their record, which must show no damage."""
    settings = {
        **{key: value for key, value in DEFAULTS.items() if not key.startswith(("run.", "checkpoint."))},
        **dict(word.split("=", 1) for word in SETTINGS),
        "optim.learning_rate": LEARNING_RATE,
        "data.num_workers": 1,
        "data.micro_batch_size": 8 // (num_nodes * ranks_per_node),
        "model.prior": models / "prior",
        "data.shards": corpus / "train",
        **{f"watchdog.{key}": value for key, value in watchdog.items()},
    }
    environment = {
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "KANDINSKY_REQUEUES": "20",
        **(environment or {}),
    }
    record = run(
        out,
        Request(
            stage="prior",
            config="prior_tiny",
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            strategy="ddp",
            options=options,
            settings=tuple(f"--{key}={value}" for key, value in settings.items()),
        ),
        faults,
        call=lambda words: cluster.run(words, env=environment, cwd=repository),
        device=f"a test cluster of {num_nodes} nodes on one machine of {os.cpu_count()} cores",
        seed=0,
        command=command,
    )
    assert [row["fault"] for row in record.rows] == [fault.name for fault in faults]
    for row in record.rows:
        assert row["samples_lost"] == row["samples_repeated"] == 0, row
        rounding = max(row["rounding_difference"], float(np.finfo(np.float32).eps))
        assert row["loss_difference"] < min(1e-5, NUM_ROUNDINGS * rounding), row
    return record.rows


def test_it_comes_back_from_killed_processes_and_a_signal(
    cluster, repository, tiny_models, small_corpus, tmp_path, monkeypatch
):
    """The signal is that of --signal=B:USR1@180, before the time is over and at a preemption."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the undisturbed run, as the jobs
    rows = struck(
        tmp_path / "out",
        FAST,
        cluster=cluster,
        repository=repository,
        models=tiny_models,
        corpus=small_corpus,
        num_nodes=2,
        ranks_per_node=1,
        environment={"KANDINSKY_PREFLIGHT": "0"},
        heartbeat_seconds=2,
    )
    printed = (tmp_path / "out" / "job.log").read_text()
    assert printed.count(", requeued") == 2, printed
    assert printed.count("ended with 75, requeued") == 1, printed
    assert printed.count("resumed ") == 2, printed
    assert [row["steps_again"] for row in rows[1:]] == [0, 0], "only a crash has steps repeated"
    ours, alone = tmp_path / "out" / "run", tmp_path / "out" / "undisturbed"
    num_steps = (len(FAST) + 2) * STRETCH_STEPS
    assert [entry["step"] for entry in metrics(ours)] == list(range(1, num_steps + 1))
    assert losses(ours) == pytest.approx(losses(alone), abs=1e-5)
    assert keys(ours) == keys(alone)


@pytest.mark.campaign
def test_it_comes_back_from_everything(
    small_disk, cluster_with_disk, repository, tiny_models, small_corpus, tmp_path, monkeypatch
):
    faults = (
        Fault("SIGKILL of a rank", kill_rank),
        Fault("SIGKILL of a rank's data workers", kill_worker, restarts=False),
        Fault("SIGSTOP of a rank", stop_rank),
        Fault("USR1 to the batch shell", ask_to_stop),
        Fault("scontrol requeue", requeue),
        Fault("from 4 nodes to 2", move_to(2)),
        Fault("from 2 nodes to 4", move_to(4)),
        Fault("the disk is full", fill, heal=make_room),
        *node_faults(cluster_with_disk),
        TIME_LIMIT,
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the undisturbed run, as the jobs
    struck(
        small_disk / "out",
        faults,
        cluster=cluster_with_disk,
        repository=repository,
        models=tiny_models,
        corpus=small_corpus,
        num_nodes=4,
        ranks_per_node=RANKS_PER_NODE,
        options=("--partition=low",),
        command="pytest --campaign all tests/slurm/test_faults.py",
        step_seconds=30,
        heartbeat_seconds=2,
    )
    for path in (small_disk / "out").glob("faults.*"):
        shutil.copy(path, tmp_path)  # the disk goes with the test
