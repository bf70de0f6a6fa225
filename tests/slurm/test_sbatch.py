"""slurm/prior.sbatch and slurm/decoder.sbatch on a real cluster.

In the fast suite test_submit.py runs the prior with fsdp2 on four nodes, and test_faults.py sends the signal
that saves and requeues a run.
"""

import signal

import pytest
from helpers.command import keys, losses, metrics

pytestmark = pytest.mark.slurm

MATRIX_STEPS = 4
NUM_STEPS = 12
"""Of a run that is stopped in the middle: enough for the signal to arrive before the last one."""
LATE = 500
WITHOUT_PREFLIGHT = {"KANDINSKY_PREFLIGHT": "0"}


@pytest.fixture(scope="module")
def started(jobs, tmp_path_factory):
    """Submit the jobs of this module that need nothing of each other; return name -> id and run folder."""
    folder = tmp_path_factory.mktemp("sbatch")
    cancelled = jobs.submit(
        "prior",
        folder / "cancelled",
        "run.max_steps=4000",
        num_nodes=1,
        ranks_per_node=1,
        environment=WITHOUT_PREFLIGHT,
    )
    mistaken = jobs.submit(
        "decoder",
        folder / "mistaken",
        "data.global_batch_size=6",
        num_nodes=1,
        environment=WITHOUT_PREFLIGHT,
    )
    return {
        "cancelled": (cancelled, folder / "cancelled"),
        "mistaken": (mistaken, folder / "mistaken"),
        "stopped": (stopped_once(jobs, folder / "stopped"), folder / "stopped"),
    }


def stopped_once(jobs, run_dir):
    """Submit the run that is stopped and submitted again; return the job's id."""
    return jobs.submit(
        "decoder",
        run_dir,
        f"run.max_steps={NUM_STEPS}",
        strategy="zero3",
        ranks_per_node=1,
        options=("--no-requeue",),
        environment=WITHOUT_PREFLIGHT,
    )


def test_scancel_ends_it_for_good(jobs, started):
    job, _ = started["cancelled"]
    jobs.cluster.wait_output(job, "step 1/", timeout=LATE)
    jobs.cluster.cancel(job)
    assert jobs.cluster.wait(job, timeout=LATE)["JobState"] == "CANCELLED"
    assert "requeued" not in jobs.cluster.output(job)


def test_a_mistake_in_the_settings_ends_the_job_with_78_and_its_line(jobs, started):
    job, _ = started["mistaken"]
    jobs.cluster.wait(job, timeout=LATE)
    assert jobs.cluster.exit_code(job) == 78, jobs.cluster.output(job)
    assert "data.global_batch_size=6 must be a multiple" in jobs.cluster.output(job)


def test_without_requeue_the_job_ends_with_75_and_the_same_command_finishes(jobs, started, tmp_path):
    job, run_dir = started["stopped"]
    jobs.cluster.wait_output(job, "step 1/", timeout=LATE)
    jobs.cluster.signal(job, signal.SIGUSR1, batch=True)
    jobs.cluster.wait(job, timeout=LATE)
    assert jobs.cluster.exit_code(job) == 75, jobs.cluster.output(job)
    assert "not requeued: submit the same command again" in jobs.cluster.output(job)
    assert 1 <= len(metrics(run_dir)) < NUM_STEPS
    again = stopped_once(jobs, run_dir)
    undisturbed = jobs.undisturbed_losses("decoder", tmp_path / "one", f"run.max_steps={NUM_STEPS}")
    printed = jobs.completed(again)
    assert printed.count("resumed ") == 1
    assert [entry["step"] for entry in metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert losses(run_dir) == pytest.approx(undisturbed, abs=1e-5), printed
    assert keys(run_dir) == keys(tmp_path / "one")


@pytest.fixture(scope="module")
def expected(jobs, tmp_path_factory):
    """Return stage -> losses of one process."""
    return {
        stage: jobs.undisturbed_losses(
            stage, tmp_path_factory.mktemp("one") / stage, f"run.max_steps={MATRIX_STEPS}"
        )
        for stage in ("prior", "decoder")
    }


@pytest.mark.campaign
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("num_nodes", [2, 4])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_nodes_of_two_ranks_lose_what_one_process_loses(stage, num_nodes, strategy, jobs, expected, tmp_path):
    job = jobs.submit(
        stage, tmp_path, f"run.max_steps={MATRIX_STEPS}", strategy=strategy, num_nodes=num_nodes
    )
    printed = jobs.completed(job)
    assert f"preflight: {num_nodes} nodes fit" in printed
    assert len(expected[stage]) == MATRIX_STEPS
    assert losses(tmp_path) == pytest.approx(expected[stage], abs=1e-5), printed


@pytest.mark.campaign
def test_a_signal_saves_and_requeues_and_the_job_ends_as_if_there_had_been_none(jobs, tmp_path):
    """To the batch shell, as --signal=B:USR1@180 sends it before the time is over and at a preemption."""
    length = "run.max_steps=40"
    job = jobs.submit("prior", tmp_path / "run", length)
    jobs.cluster.wait_output(job, "step 1/", timeout=LATE)
    jobs.cluster.signal(job, signal.SIGUSR1, batch=True)
    printed = jobs.completed(job)
    assert "ended with 75, requeued" in printed
    assert printed.count("resumed ") == 1
    steps = [entry["step"] for entry in metrics(tmp_path / "run")]
    assert steps == list(range(1, 41)), "every step once, none repeated or left out"
    alone = jobs.undisturbed_losses("prior", tmp_path / "one", length)
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)
    assert sorted(keys(tmp_path / "run").items()) == sorted(keys(tmp_path / "one").items())
