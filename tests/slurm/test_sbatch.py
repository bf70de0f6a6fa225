"""slurm/prior.sbatch and slurm/decoder.sbatch on a real cluster."""

import signal

import pytest
from helpers.command import keys, losses, metrics
from jobs import CAMPAIGN, Jobs

pytestmark = pytest.mark.slurm

STEPS = 4
ALL = [
    (stage, num_nodes, strategy)
    for stage in ("prior", "decoder")
    for num_nodes in (2, 4)
    for strategy in ("ddp", "fsdp2", "zero2", "zero3")
]
# Each stage and number of nodes once; test_submit.py and test_faults.py have ddp. The rest: the campaign.
SOME = [("prior", 4, "fsdp2"), ("decoder", 2, "zero3")]


@pytest.fixture(scope="module")
def jobs(four_nodes, repository, tiny_models, small_corpus):
    return Jobs(four_nodes, repository, tiny_models, small_corpus)


@pytest.fixture(scope="module")
def expected(jobs, tmp_path_factory):
    """Stage -> losses of one process."""
    return {
        stage: jobs.undisturbed_losses(
            stage, tmp_path_factory.mktemp("one") / stage, f"run.max_steps={STEPS}"
        )
        for stage in ("prior", "decoder")
    }


@pytest.mark.parametrize(("stage", "num_nodes", "strategy"), ALL if CAMPAIGN else SOME)
def test_nodes_of_two_ranks_lose_what_one_process_loses(stage, num_nodes, strategy, jobs, expected, tmp_path):
    job = jobs.submit(stage, tmp_path, f"run.max_steps={STEPS}", strategy=strategy, num_nodes=num_nodes)
    printed = jobs.completed(job)
    assert f"preflight: {num_nodes} nodes fit" in printed
    assert len(expected[stage]) == STEPS
    assert losses(tmp_path) == pytest.approx(expected[stage], abs=1e-5), printed


def test_a_signal_saves_and_requeues_and_the_job_ends_as_if_there_had_been_none(jobs, tmp_path):
    """To the batch shell, as --signal=B:USR1@180 sends it before the time is over and at a preemption."""
    length = "run.max_steps=40"
    job = jobs.submit("prior", tmp_path / "run", length)
    jobs.cluster.wait_output(job, "step 1/", timeout=300)
    jobs.cluster.signal(job, signal.SIGUSR1, batch=True)
    printed = jobs.completed(job)
    assert "ended with 75, requeued" in printed
    assert printed.count("resumed ") == 1
    steps = [entry["step"] for entry in metrics(tmp_path / "run")]
    assert steps == list(range(1, 41)), "every step once, none repeated or left out"
    alone = jobs.undisturbed_losses("prior", tmp_path / "one", length)
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)
    assert sorted(keys(tmp_path / "run").items()) == sorted(keys(tmp_path / "one").items())


def test_without_requeue_the_job_ends_with_75_and_the_same_command_finishes(jobs, tmp_path):
    length = "run.max_steps=40"
    job = jobs.submit("prior", tmp_path, length, options=("--no-requeue",))
    jobs.cluster.wait_output(job, "step 1/", timeout=300)
    jobs.cluster.signal(job, signal.SIGUSR1, batch=True)
    jobs.cluster.wait(job, timeout=120)
    assert jobs.cluster.exit_code(job) == 75, jobs.cluster.output(job)
    assert "not requeued: submit the same command again" in jobs.cluster.output(job)
    assert 1 <= len(metrics(tmp_path)) < 40
    jobs.completed(jobs.submit("prior", tmp_path, length))
    assert [entry["step"] for entry in metrics(tmp_path)] == list(range(1, 41))


def test_scancel_ends_it_for_good(jobs, tmp_path):
    job = jobs.submit("prior", tmp_path, "run.max_steps=400")
    jobs.cluster.wait_output(job, "step 1/", timeout=300)
    jobs.cluster.cancel(job)
    assert jobs.cluster.wait(job, timeout=120)["JobState"] == "CANCELLED"
    assert "requeued" not in jobs.cluster.output(job)


def test_a_mistake_in_the_settings_ends_the_job_with_78_and_its_line(jobs, tmp_path):
    job = jobs.submit("decoder", tmp_path, "data.global_batch_size=6")
    jobs.cluster.wait(job, timeout=120)
    assert jobs.cluster.exit_code(job) == 78, jobs.cluster.output(job)
    assert "data.global_batch_size=6 must be a multiple" in jobs.cluster.output(job)
