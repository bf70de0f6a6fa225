"""Other people's launchers, on two nodes of two ranks: the same command, the losses of one process."""

import os
import shlex

import pytest
from helpers.command import losses, train_arguments
from jobs import RANKS_PER_NODE, SETTINGS, Jobs

pytestmark = pytest.mark.slurm

STEPS = 3
NUM_NODES = 2
# Where the first node listens; every cluster of these tests has a network of its own.
PORT = 29400


@pytest.fixture(scope="module")
def jobs(cluster, repository, tiny_models, small_corpus):
    return Jobs(cluster, repository, tiny_models, small_corpus)


@pytest.fixture(scope="module")
def expected(jobs, tmp_path_factory):
    return jobs.undisturbed_losses("prior", tmp_path_factory.mktemp("one") / "run", f"run.max_steps={STEPS}")


def accelerate(repository, _hostfile):
    """What launch/accelerate/zero2.yaml says, on more machines than it says."""
    words = ["accelerate", "launch", "--config_file", repository / "launch" / "accelerate" / "zero2.yaml"]
    words += ["--num_machines", NUM_NODES, "--num_processes", NUM_NODES * RANKS_PER_NODE]
    # accelerate's other ways to start a DeepSpeed run on several machines need ssh.
    words += ["--deepspeed_multinode_launcher", "standard"]
    words += ["--machine_rank", "$SLURM_NODEID", "--main_process_ip", "n0", "--main_process_port", PORT]
    return [*words, "--mixed_precision", "no", "-m", "kandinsky_dist"]


def deepspeed(_repository, hostfile):
    """With a hostfile; srun takes the place of ssh."""
    words = ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", "$SLURM_NODEID"]
    words += ["--master_addr", "n0", "--master_port", PORT]
    return [*words, "--no_local_rank", "--module", "kandinsky_dist"]


@pytest.mark.parametrize("launcher", [accelerate, deepspeed])
def test_the_same_command_under_another_launcher(launcher, jobs, expected, tmp_path, repository):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"n{index} slots={RANKS_PER_NODE}\n" for index in range(NUM_NODES)))
    words = train_arguments(
        "prior",
        *SETTINGS,
        "data.micro_batch_size=2",
        f"run.max_steps={STEPS}",
        models=jobs.models,
        corpus=jobs.corpus,
        run_dir=tmp_path / "run",
        strategy="zero2",
    )
    command = " ".join(map(str, launcher(repository, hostfile))) + " " + shlex.join(words)
    job = jobs.cluster.sbatch(
        [
            f"--nodes={NUM_NODES}",
            f"--wrap=srun --ntasks-per-node=1 bash -c {shlex.quote(command)}",
        ],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(repository)},
        cwd=repository,
    )
    printed = jobs.completed(job)
    assert len(expected) == STEPS
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5), printed
