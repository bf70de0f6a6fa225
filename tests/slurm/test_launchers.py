"""Other people's launchers, on two nodes of two ranks: the same command, the losses of one process."""

import os
import shlex

import pytest
from helpers.command import losses, train_arguments
from jobs import PRIOR_STEPS, RANKS_PER_NODE, SETTINGS

pytestmark = pytest.mark.slurm

NUM_NODES = 2
# Where the first node listens for each launcher; the cluster has a network of its own.
PORTS = {"accelerate": 29400, "deepspeed": 29401}


def accelerate(repository, _hostfile):
    """Return the command for launch/accelerate/zero2.yaml, on more machines than that file names."""
    words = ["accelerate", "launch", "--config_file", repository / "launch" / "accelerate" / "zero2.yaml"]
    words += ["--num_machines", NUM_NODES, "--num_processes", NUM_NODES * RANKS_PER_NODE]
    # accelerate's other ways to start a DeepSpeed run on several machines need ssh.
    words += ["--deepspeed_multinode_launcher", "standard"]
    words += ["--machine_rank", "$SLURM_NODEID", "--main_process_ip", "n0"]
    words += ["--main_process_port", PORTS["accelerate"]]
    return [*words, "--mixed_precision", "no", "-m", "kandinsky_dist"]


def deepspeed(_repository, hostfile):
    """Return the command with a hostfile; srun takes the place of ssh."""
    words = ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", "$SLURM_NODEID"]
    words += ["--master_addr", "n0", "--master_port", PORTS["deepspeed"]]
    return [*words, "--no_local_rank", "--module", "kandinsky_dist"]


LAUNCHERS = (accelerate, deepspeed)


@pytest.fixture(scope="module")
def started(jobs, repository, tmp_path_factory):
    """Submit a job for each launcher, all together; return name -> id and run folder."""
    found = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher.__name__)
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"n{index} slots={RANKS_PER_NODE}\n" for index in range(NUM_NODES)))
        words = train_arguments(
            "prior",
            *SETTINGS,
            "data.micro_batch_size=2",
            f"run.max_steps={PRIOR_STEPS}",
            models=jobs.models,
            corpus=jobs.corpus,
            run_dir=folder / "run",
            strategy="zero2",
        )
        command = " ".join(map(str, launcher(repository, hostfile))) + " " + shlex.join(words)
        job = jobs.cluster.sbatch(
            [
                f"--nodelist=n[0-{NUM_NODES - 1}]",
                f"--wrap=srun --ntasks-per-node=1 bash -c {shlex.quote(command)}",
            ],
            env={"OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(repository)},
            cwd=repository,
        )
        found[launcher.__name__] = (job, folder / "run")
    return found


@pytest.mark.parametrize("launcher", [launcher.__name__ for launcher in LAUNCHERS])
def test_the_same_command_under_another_launcher(launcher, started, jobs, prior_losses):
    job, run_dir = started[launcher]
    expected = prior_losses()
    printed = jobs.completed(job)
    assert len(expected) == PRIOR_STEPS
    assert losses(run_dir) == pytest.approx(expected, abs=1e-5), printed
