"""Whatever a crash or a disk leaves behind, the next start takes the newest whole checkpoint and goes on."""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import keys, losses, train_arguments
from helpers.forked import started, train
from helpers.running import ranks_of, wait_until

from kandinsky_dist.checkpoint.layout import COMMIT, checkpoints_of

pytestmark = pytest.mark.dist

NUM_STEPS = 24
SETTINGS = (
    f"run.max_steps={NUM_STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.async_save=true",
    "data.num_workers=1",
    "data.micro_batch_size=2",
)
STRATEGIES = ("ddp", "zero2", "fsdp2")
NUM_RUNS = int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "2"))
KILLS_PER_RUN = 2

Undisturbed = Callable[[str], Path]


@pytest.fixture(scope="module")
def undisturbed(tiny_models, small_corpus, tmp_path_factory) -> Undisturbed:
    """Run folders of runs that nothing happened to."""
    runs: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in runs:
            runs[strategy] = tmp_path_factory.mktemp("undisturbed") / "run"
            complete(strategy, models=tiny_models, corpus=small_corpus, run_dir=runs[strategy])
        return runs[strategy]

    return run


def complete(strategy: str, *settings: str, **places: Any) -> str:
    """Trains to the end; returns what was said."""
    done = train("prior", *SETTINGS, *settings, **places, world_size=2, strategy=strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def whole(folder: Path) -> bool:
    """Whether a checkpoint is what was written, without the code under test."""
    try:
        promised = json.loads((folder / COMMIT).read_text())["files"]
        found = {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            }
            for name in promised
        }
    except (OSError, ValueError):
        return False
    return found == promised and len(promised) == 4  # two ranks, state, configuration


def newest(run_dir: Path) -> Path | None:
    """The checkpoint that the next start must take."""
    return next((folder for folder in checkpoints_of(run_dir / "checkpoints") if whole(folder)), None)


def assert_took(said: str, expected: Path | None) -> None:
    """A start resumed exactly the expected checkpoint."""
    lines = [line for line in said.splitlines() if line.startswith("kandinsky-dist: resumed ")]
    assert len(lines) == (expected is not None), said
    assert expected is None or f"resumed {expected} at sample" in lines[0]


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Weights, moments and state to the last bit; losses and keys too."""
    last = f"step_{NUM_STEPS:08d}"
    files, expected = (
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / "checkpoints" / last).glob("[rs]*")  # not the configuration: it has run.dir
        }
        for folder in (run_dir, reference)
    )
    assert len(files) == 3
    assert files == expected
    assert losses(run_dir) == losses(reference)
    assert keys(run_dir) == keys(reference)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) and max(entry_steps(path)) if path.exists() else 0


def entry_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")] or [0]


def wait_for_a_step(process: Any, run_dir: Path, draw: random.Random) -> None:
    """Some moment of some step."""
    at_least = last_step(run_dir) + draw.randrange(2, 6)
    wait_until(lambda: last_step(run_dir) >= at_least, process)
    time.sleep(draw.random() * 0.2)


def freeze_in_a_write(process: Any, run_dir: Path, draw: random.Random) -> None:
    """Stops all ranks while a checkpoint is being written: its folder is there and is not finished."""
    left = set((run_dir / "checkpoints").glob("*.tmp"))  # by the kill before
    ranks = list(wait_until(lambda: len(found := ranks_of(process)) == 2 and found, process).values())
    checkpoints = run_dir / "checkpoints"

    def is_unfinished() -> bool:
        return any(path not in left and not (path / COMMIT).exists() for path in checkpoints.glob("step_*"))

    num_seen, wanted = 0, draw.randrange(1, 4)
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, process.said()[-3000:]
        assert time.monotonic() < deadline, "no write was met"
        if not is_unfinished():
            time.sleep(0.001)
            continue
        time.sleep(draw.random() * 0.03)  # anywhere in it
        for rank in ranks:
            rank.suspend()
        num_seen += is_unfinished()
        if num_seen >= wanted and is_unfinished():
            return
        for rank in ranks:
            rank.resume()
        time.sleep(0.001)


@pytest.mark.long
@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_killed_at_random_moments_and_in_writes_it_ends_as_if_undisturbed(
    number, undisturbed, tiny_models, small_corpus, tmp_path
):
    draw = random.Random(number)
    strategy = STRATEGIES[number % len(STRATEGIES)]
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path}
    arguments = train_arguments("prior", *SETTINGS, **places, strategy=strategy)
    moments = [wait_for_a_step, freeze_in_a_write]
    draw.shuffle(moments)
    for moment in moments[:KILLS_PER_RUN]:
        expected = newest(tmp_path)
        with started(arguments, 2) as run:
            moment(run, tmp_path, draw)
            if moment is wait_for_a_step and draw.random() < 0.5:
                draw.choice(list(ranks_of(run).values())).kill()  # the other loses its peer
                run.wait(120)
            else:
                run.kill()
            said = run.said()
        assert_took(said, expected)
        assert last_step(tmp_path) < NUM_STEPS, "it was killed too late to show anything"
    expected = newest(tmp_path)  # None where both kills came before the first was whole
    assert_took(complete(strategy, **places), expected)
    assert_same_end(tmp_path, undisturbed(strategy))
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {f"step_{step:08d}" for step in (NUM_STEPS - 4, NUM_STEPS - 2, NUM_STEPS)}


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_kind_of_damage_is_named_and_passed_over(undisturbed, tiny_models, small_corpus, tmp_path):
    """Seven checkpoints, each damaged in its own way, newest first; the eighth is taken."""
    reference = undisturbed("ddp")
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path}
    complete("ddp", "checkpoint.keep=9", **places)
    assert_same_end(tmp_path, reference)
    folders = checkpoints_of(tmp_path / "checkpoints")
    assert len(folders) == 9
    changed = "its bytes changed since they were written"
    expected = []
    for folder, name, reason in (
        (folders[0], "rank_00000.safetensors", changed),
        (folders[1], "rank_00001.safetensors", changed),
        (folders[2], "state.json", changed),
        (folders[3], "config.yaml", changed),
    ):
        flip(folder / name)
        expected.append(f"{folder}: {name}: {reason}")
    flip(folders[4] / COMMIT)
    expected.append(f"{folders[4]}: ")  # which of its values the bit was in is its affair
    (folders[5] / "rank_00001.safetensors").unlink()
    expected.append(f"{folders[5]}: rank_00001.safetensors: No such file or directory")
    (folders[6] / COMMIT).unlink()
    expected.append(f"{folders[6]}: no {COMMIT}: it was never finished")
    cut_off = folders[0].with_name("step_00000025.tmp")
    shutil.copytree(folders[8], cut_off)
    expected.append(f"{cut_off}: its writing was cut off")
    said = complete("ddp", "checkpoint.keep=9", **places)
    for line in expected:
        assert f"kandinsky-dist: passed over {line}" in said, said
    assert said.count("passed over") == len(expected)
    assert_took(said, folders[7])
    assert_same_end(tmp_path, reference)
    assert not cut_off.exists()
    assert all(whole(folder) for folder in checkpoints_of(tmp_path / "checkpoints"))
