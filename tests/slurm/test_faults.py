"""A run of several nodes that things happen to, one after the other, and that comes back by itself."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.command import DEFAULTS
from jobs import CAMPAIGN, SETTINGS

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
from kandinsky_dist.bench.faults import Request, run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3000)]

SOME = (
    Fault("SIGKILL of a rank", kill_rank),
    Fault("SIGKILL of a rank's data workers", kill_worker, restarts=False),
)

NUM_ROUNDINGS = 10
"""That a loss may be off by: the distance of two runs that nothing happens to, or a rounding near 1."""
LEARNING_RATE = 1e-4
"""Lower than elsewhere: at that one training amplifies roundings until they would hide what a fault does."""
LEFT_BYTES = 200_000
"""On the full disk: enough for lines of logs, not for a checkpoint."""


@pytest.fixture(scope="module")
def small_disk(slurm_available, tmp_path_factory):
    """A disk for the run, mounted before the nodes boot, which so have it too."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(job, _dice):
    """The disk of the run is full, from one moment to the next."""
    folder = job.output.parent
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - LEFT_BYTES)


def make_room(job):
    (job.output.parent / "filler").unlink()


def node_faults(cluster):
    """Those that only the owner of the cluster can bring about."""
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


def test_it_comes_back_from_everything(
    small_disk, four_nodes, repository, tiny_models, small_corpus, tmp_path
):
    faults = SOME
    if CAMPAIGN:
        faults = (
            *SOME,
            Fault("SIGSTOP of a rank", stop_rank),
            Fault("USR1 to the batch shell", ask_to_stop),
            Fault("scontrol requeue", requeue),
            Fault("from 4 nodes to 2", move_to(2)),
            Fault("from 2 nodes to 4", move_to(4)),
            Fault("the disk is full", fill, heal=make_room),
            *node_faults(four_nodes),
            TIME_LIMIT,
        )
    settings = {
        **{key: value for key, value in DEFAULTS.items() if not key.startswith(("run.", "checkpoint."))},
        **dict(word.split("=", 1) for word in SETTINGS),
        "optim.learning_rate": LEARNING_RATE,
        "data.num_workers": 1,
        "data.micro_batch_size": 1,
        "model.prior": tiny_models / "prior",
        "data.shards": small_corpus / "train",
        "watchdog.step_seconds": 30,
        "watchdog.heartbeat_seconds": 2,
    }
    environment = {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}

    def call(command):
        return four_nodes.run(command, env={**environment, "KANDINSKY_REQUEUES": "20"}, cwd=repository)

    record = run(
        small_disk / "out",
        Request(
            stage="prior",
            config="prior_tiny",
            num_nodes=4,
            ranks_per_node=2,
            strategy="ddp",
            options=("--partition=low",),
            settings=tuple(f"--{key}={value}" for key, value in settings.items()),
        ),
        faults,
        call=call,
        device=f"a test cluster of 4 nodes on one machine of {os.cpu_count()} cores",
        seed=0,
        command="KANDINSKY_DIST_CAMPAIGN=1 pytest tests/slurm/test_faults.py" if CAMPAIGN else "",
    )
    for path in (small_disk / "out").glob("faults.*"):
        shutil.copy(path, tmp_path)  # the disk goes with the test
    assert [row["fault"] for row in record.rows] == [fault.name for fault in faults]
    for row in record.rows:
        assert row["samples_lost"] == row["samples_repeated"] == 0, row
        rounding = max(row["rounding_difference"], float(np.finfo(np.float32).eps))
        assert row["loss_difference"] < min(1e-5, NUM_ROUNDINGS * rounding), row
