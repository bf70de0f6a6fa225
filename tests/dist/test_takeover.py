"""Two jobs on one run folder: the newer one goes on, the older one ends and damages nothing."""

import signal
from pathlib import Path

import pytest
from dist.watch_programs import taken_over_in_its_report
from helpers import forked
from helpers.command import keys, losses, metrics, train_arguments
from helpers.running import ranks_of, wait_until

from kandinsky_dist.checkpoint.files import checkpoints_of, checksum, damage
from kandinsky_dist.faults.fence import read_owner

pytestmark = pytest.mark.dist

SETTINGS = ("checkpoint.every_steps=1", "checkpoint.keep=100", "data.num_workers=1")


def test_the_older_of_two_runs_ends_before_it_writes(tiny_models, small_corpus, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus}
    run_dir, reference = tmp_path / "run", tmp_path / "undisturbed"
    words = train_arguments(
        "prior", *SETTINGS, "run.max_steps=100000", **places, run_dir=run_dir, strategy="ddp"
    )
    with forked.started(words, 2) as older:
        wait_until(lambda: len(checkpoints_of(run_dir / "checkpoints")) >= 2, older)
        for rank in ranks_of(older).values():
            rank.send_signal(signal.SIGSTOP)  # cut off, as a node that its cluster holds for dead
        reached = saved_step(run_dir)
        newer = forked.train(
            "prior", *SETTINGS, f"run.max_steps={reached + 3}", **places, run_dir=run_dir, world_size=2
        )
        assert newer.returncode == 0, newer.stderr
        assert f"resumed {run_dir / 'checkpoints'}" in newer.stderr
        before = content(run_dir)
        for rank in ranks_of(older).values():
            rank.send_signal(signal.SIGCONT)  # and comes back
        assert older.wait(120) == 78, older.said()
        said = older.said()
    assert f"run.dir={run_dir} was taken over by start 2 of this run" in said, said
    assert content(run_dir) == before, "the older run has written into a folder that is not its own"
    assert read_owner(run_dir).start == 2
    folders = checkpoints_of(run_dir / "checkpoints")
    assert saved_step(run_dir) == reached + 3
    assert [damage(folder) for folder in folders] == [None] * len(folders)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))

    done = forked.train(
        "prior", *SETTINGS, f"run.max_steps={reached + 3}", **places, run_dir=reference, world_size=2
    )
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(reference)
    assert keys(run_dir) == keys(reference)


def test_the_older_run_looks_right_before_it_logs(tiny_models, small_corpus, tmp_path):
    """A validation takes minutes, and a process may be held at any moment."""
    words = train_arguments(
        "prior", "run.max_steps=4", "validation.every_steps=2", "data.num_workers=0", models=tiny_models,
        corpus=small_corpus, run_dir=tmp_path, strategy="ddp",
    )  # fmt: skip
    done = forked.call(taken_over_in_its_report, words, world_size=2)
    assert done.returncode == 78, done.stderr
    assert f"run.dir={tmp_path} was taken over by start 2 of this run" in done.stderr
    assert [entry["step"] for entry in metrics(tmp_path)] == [1]


def saved_step(run_dir: Path) -> int:
    return int(checkpoints_of(run_dir / "checkpoints")[0].name.removeprefix("step_"))


def content(run_dir: Path) -> dict[str, str]:
    """All that counts in a run folder: the sum of each file, as a difference is printed."""
    found = [run_dir / "metrics.jsonl", run_dir / "owner.json", run_dir / "config.yaml"]
    found += sorted((run_dir / "checkpoints").rglob("*"))
    return {str(path): checksum(path)["sha256"] for path in found if path.is_file()}
