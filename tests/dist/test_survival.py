"""What is killed or stopped goes on as if nothing had happened: the same losses to the last bit and keys."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import forked, running
from helpers.command import keys, losses, train_arguments
from helpers.forked import train
from helpers.running import ranks_of, wait_until

from kandinsky_dist.checkpoint.layout import checkpoints_of
from kandinsky_dist.checkpoint.manager import newest_whole

pytestmark = pytest.mark.dist

NUM_STEPS = 10
SETTINGS = (
    f"run.max_steps={NUM_STEPS}",
    "checkpoint.every_steps=3",
    "data.num_workers=1",
    "data.micro_batch_size=2",
)
NUM_KILLS = int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "2"))


def started(world_size: int, stage: str, *settings: str, **places: Any) -> Any:
    """A run in the background; whatever is left of it is killed at the end."""
    return forked.started(train_arguments(stage, *SETTINGS, *settings, **places), world_size)


def last_step(run_dir: Path) -> int:
    """Step of the newest line of metrics.jsonl, 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.fixture(scope="module")
def undisturbed(tiny_models, small_corpus, tmp_path_factory) -> Callable[[str, str, int], Path]:
    """Run folders of runs that nothing happened to."""
    runs: dict[tuple[str, str, int], Path] = {}

    def run(stage: str, strategy: str, world_size: int) -> Path:
        case = (stage, strategy, world_size)
        if case not in runs:
            runs[case] = tmp_path_factory.mktemp("undisturbed") / "run"
            done = train(
                stage,
                *SETTINGS,
                models=tiny_models,
                corpus=small_corpus,
                run_dir=runs[case],
                world_size=world_size,
                strategy=strategy,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        return runs[case]

    return run


def assert_same(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    assert keys(run_dir) == keys(reference)
    assert len(losses(run_dir)) == NUM_STEPS


CASES = [("prior", "ddp", 2), ("prior", "zero2", 2), ("decoder", "zero3", 2), ("decoder", "ddp", 1)]


@pytest.mark.long
@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_kill_9_of_all_processes_at_a_random_step_changes_nothing(
    number, undisturbed, tiny_models, small_corpus, tmp_path
):
    stage, strategy, world_size = CASES[number % len(CASES)]
    draw = random.Random(number)
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path, "strategy": strategy}
    with started(world_size, stage, **places) as process:
        step = draw.randrange(1, NUM_STEPS)
        wait_until(lambda: last_step(tmp_path) >= step, process)
        time.sleep(draw.random() * 0.3)  # anywhere in a step or a save
    done = train(
        stage, *SETTINGS, models=tiny_models, corpus=small_corpus, run_dir=tmp_path,
        world_size=world_size, strategy=strategy,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path, undisturbed(stage, strategy, world_size))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_saves_and_ends_with_75(
    number, undisturbed, tiny_models, small_corpus, tmp_path
):
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path, "strategy": "ddp"}
    with started(1, "decoder", **places) as process:
        wait_until(lambda: last_step(tmp_path) >= 4, process)
        ranks_of(process)[0].send_signal(number)
        assert process.wait(120) == 75, process.said()
        said = process.said()
    assert "the same command continues" in said.splitlines()[-1]
    assert "Traceback" not in said
    saved = newest_whole(tmp_path / "checkpoints").folder
    assert int(saved.name.removeprefix("step_")) == last_step(tmp_path), (
        "a step was trained that was not saved"
    )
    done = train("decoder", *SETTINGS, models=tiny_models, corpus=small_corpus, run_dir=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path, undisturbed("decoder", "ddp", 1))


def test_a_signal_to_any_one_rank_stops_all_at_the_same_step(
    undisturbed, tiny_models, small_corpus, tmp_path
):
    """From the command line, under torchrun."""
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path, "strategy": "zero2"}
    with running.started(train_arguments("prior", *SETTINGS, **places), 2) as process:
        wait_until(lambda: last_step(tmp_path) >= 2, process)
        ranks_of(process)[1].send_signal(signal.SIGUSR1)
        process.wait(120)
        said = process.stderr.read()
    assert said.count("exitcode  : 75") == 2, said[-3000:]
    found = newest_whole(tmp_path / "checkpoints")
    assert not found.passed_over
    assert int(found.folder.name.removeprefix("step_")) == last_step(tmp_path)
    done = train(
        "prior", *SETTINGS, models=tiny_models, corpus=small_corpus, run_dir=tmp_path,
        world_size=2, strategy="zero2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path, undisturbed("prior", "zero2", 2))


def test_a_checkpoint_moves_between_strategies_and_world_sizes(
    undisturbed, tiny_models, small_corpus, tmp_path
):
    moves = [("zero2", 2, 3), ("ddp", 1, 5), ("zero3", 2, 7), ("zero1", 1, 9), ("zero0", 2, NUM_STEPS)]
    for strategy, world_size, until in moves:
        done = train(
            "prior", *SETTINGS, f"run.max_steps={until}", models=tiny_models, corpus=small_corpus,
            run_dir=tmp_path, world_size=world_size, strategy=strategy,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    reference = undisturbed("prior", "ddp", 2)
    assert keys(tmp_path) == keys(reference)
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-5)


def test_retention_keeps_the_newest(undisturbed):
    folders = checkpoints_of(undisturbed("prior", "ddp", 2) / "checkpoints")
    assert [folder.name for folder in folders] == ["step_00000010", "step_00000009", "step_00000006"]
