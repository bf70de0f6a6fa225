"""A run that hangs ends by itself and names who did not arrive; the same command then goes on unharmed."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from dist import watch_programs
from helpers import forked, running
from helpers.command import losses, metrics, train_arguments
from helpers.running import ranks_of, wait_until

from kandinsky_dist.faults.heartbeat import read_beats, start_folder
from kandinsky_dist.status.collect import collect

pytestmark = pytest.mark.dist

NUM_STEPS = 6
SETTINGS = (
    f"run.max_steps={NUM_STEPS}",
    "checkpoint.every_steps=2",
    "data.num_workers=1",
)
IMPATIENT = (
    "watchdog.heartbeat_seconds=0.5",
    "watchdog.start_seconds=60",
    "watchdog.step_seconds=6",
    "watchdog.pause_seconds=20",
)


def test_a_stopped_rank_is_named_and_the_same_command_resumes(tiny_models, small_corpus, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus}
    run_dir = tmp_path / "run"
    many = "run.max_steps=1000"  # so that it cannot end before it is stopped
    arguments = train_arguments(
        "prior", *SETTINGS, *IMPATIENT, many, **places, run_dir=run_dir, strategy="ddp"
    )
    with running.started(arguments, 2) as process:
        wait_until(lambda: len(entries(run_dir)) >= 3, process)
        ranks = ranks_of(process)
        ranks[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: has_ended(ranks[0]), process)
        assert not has_ended(ranks[1]), "it was not ended before the others had noticed"
        wait_until(lambda: collect(run_dir).state == "failed", process)
        detail = collect(run_dir).detail
        # torchrun ends a rank that is stopped after half a minute; this is not about torchrun.
        running.end_all(process)
        said = process.stderr.read()
    line = f"hang: rank 1 ({os.uname().nodename}, process {ranks[1].pid}) said nothing for "
    assert detail.startswith(line)
    assert said.count(line) == 1, said
    hangs = run_dir / "hangs" / "start_00001"
    assert json.loads((hangs / "verdict.json").read_text())["ranks"] == [1]
    stacks = (hangs / "rank_00000.txt").read_text()
    assert "trainer.py" in stacks, stacks
    collectives = json.loads((hangs / "rank_00000.collectives.json").read_text())
    assert any("gloo:" in entry["profiling_name"] for entry in collectives["entries"])
    assert not (hangs / "rank_00001.txt").exists()

    last = metrics(run_dir)[-1]["step"] + 2
    for folder in (run_dir, tmp_path / "undisturbed"):
        done = forked.train(
            "prior", *SETTINGS, f"run.max_steps={last}", **places, run_dir=folder, world_size=2
        )
        assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    assert collect(run_dir).state == "finished"
    assert collect(run_dir).num_restarts == 1


def has_ended(rank: psutil.Process) -> bool:
    """Whether a process is gone, or waits for its parent to take note of that."""
    return not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def entries(run_dir: Path) -> list[dict]:
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def test_a_process_that_keeps_the_interpreters_lock_is_named_too(tiny_models, small_corpus, tmp_path):
    """Its own watchdog cannot run; that of its neighbour does."""
    hung = tmp_path / "hung"
    arguments = train_arguments(
        "prior", *SETTINGS, *IMPATIENT, models=tiny_models, corpus=small_corpus, run_dir=tmp_path / "run",
        strategy="ddp",
    )  # fmt: skip
    done = forked.call(watch_programs.one_keeps_the_lock, arguments, 1, hung, world_size=2, timeout=150)
    assert hung.exists()
    assert "hang: rank 1 (" in done.stderr, done.stderr
    assert "said nothing for" in done.stderr


def test_a_slow_run_is_left_alone_and_leaves_its_signs(tiny_models, small_corpus, tmp_path):
    """Steps that take longer than a heartbeat, and all phases: no verdict, and every rank ends in peace."""
    done = forked.train(
        "prior", *SETTINGS, "watchdog.heartbeat_seconds=0.05", "watchdog.step_seconds=60",
        "validation.every_steps=3", models=tiny_models, corpus=small_corpus, run_dir=tmp_path, world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hang" not in done.stderr
    assert not (tmp_path / "hangs").exists()
    beats = read_beats(start_folder(tmp_path, 1))
    assert [(beat.exit_code, beat.step, beat.phase) for beat in beats.values()] == [
        (0, NUM_STEPS, "leave")
    ] * 2
    assert len({beat.moves for beat in beats.values()}) == 1, "all ranks went through the same phases"
    assert min(beat.count for beat in beats.values()) > 3
    assert min(beat.save_seconds for beat in beats.values()) > 0
