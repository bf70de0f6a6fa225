"""A run whose time is nearly over saves itself and stops; it never begins a checkpoint that cannot end."""

import json
import time
from pathlib import Path

import pytest
from helpers import forked
from helpers.command import losses, metrics, train_arguments

from kandinsky_dist.checkpoint.files import checkpoints_of
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.faults.fence import OWNER
from kandinsky_dist.status.collect import collect

pytestmark = pytest.mark.dist

LONG = "run.max_steps=100000"


@pytest.fixture
def start(tiny_models, small_corpus):
    """Starts the prior in a folder, in a job that ends after some seconds if any are given."""

    def start(run_dir: Path, *settings: str, seconds: float | None = None, world_size: int = 1):
        words = train_arguments(
            "prior", *settings, models=tiny_models, corpus=small_corpus, run_dir=run_dir, strategy="ddp"
        )
        end = None if seconds is None else str(int(time.time() + seconds))
        environment = {} if end is None else {"SLURM_JOB_END_TIME": end}
        return forked.command(*words, world_size=world_size, timeout=300, environment=environment)

    return start


def test_it_stops_and_saves_before_the_job_ends(start, tmp_path):
    done = start(tmp_path / "run", LONG, "run.time_margin_seconds=280", seconds=300, world_size=2)
    assert done.returncode == 75, done.stderr
    assert "the run saves itself and stops" in done.stderr
    assert "the same command continues" in done.stderr
    found = newest_whole(tmp_path / "run" / "checkpoints")
    last = metrics(tmp_path / "run")[-1]["step"]
    assert int(found.folder.name.removeprefix("step_")) == last
    status = collect(tmp_path / "run")
    assert (status.state, status.last_checkpoint_problem) == ("stopped", None)

    for folder in (tmp_path / "run", tmp_path / "undisturbed"):
        done = start(folder, f"run.max_steps={last + 1}", world_size=2)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_a_limit_of_its_own_stops_it_too(start, tmp_path):
    done = start(tmp_path, LONG, "run.time_limit_seconds=61")
    assert done.returncode == 75, done.stderr
    assert checkpoints_of(tmp_path / "checkpoints")


def test_a_checkpoint_that_cannot_end_is_not_begun(start, tmp_path):
    assert start(tmp_path, "run.max_steps=2").returncode == 0
    owner = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**owner, "save_seconds": 1e6}))  # as if it had been slow
    done = start(tmp_path, LONG, "checkpoint.every_steps=1", seconds=10_000)
    assert done.returncode == 75, done.stderr
    assert "stopped before step 3 was saved" in done.stderr
    assert "a checkpoint takes up to 1500000 s; the same command continues from step 2" in done.stderr
    assert [path.name for path in checkpoints_of(tmp_path / "checkpoints")] == ["step_00000002"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
