"""A run's folder of checkpoints in the states that crashes, people and file systems leave it in."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    STATE,
    CheckpointReader,
    RunState,
    checkpoints_of,
    damage,
    folder_name,
)
from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.parallel.base import Fragment
from kandinsky_dist.runtime.process import Process, joined

pytestmark = pytest.mark.dist


class OneParameter:
    """What a manager asks of a strategy."""

    def fragments(self) -> list[Fragment]:
        return [Fragment("w", 0, 4, torch.ones(4), torch.zeros(4), torch.zeros(4))]


@pytest.fixture
def process(monkeypatch) -> Iterator[Process]:
    """This process, alone in a group."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with joined() as found:
        yield found


def manager(run_dir: Path, process: Process, *, is_async: bool = False) -> CheckpointManager:
    return CheckpointManager(
        run_dir, process, keep=2, identity={"run.seed": 1}, config_yaml="stage: prior\n", is_async=is_async
    )


def saved(run_dir: Path, process: Process, *steps: int) -> CheckpointManager:
    """A run that has been saved at some steps."""
    found = manager(run_dir, process)
    for step in steps:
        found.save(OneParameter(), RunState(step))
    return found


def steps_in(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, newest first; all must be whole."""
    folders = checkpoints_of(run_dir / "checkpoints")
    assert [damage(folder) for folder in folders] == [None] * len(folders)
    return [int(folder.name[5:]) for folder in folders]


def damaged(run_dir: Path, step: int) -> None:
    path = run_dir / "checkpoints" / folder_name(step) / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_damaged_checkpoints_take_the_place_of_no_whole_one(process, tmp_path):
    saved(tmp_path, process, 4, 8, 10)
    shutil.copytree(tmp_path / "checkpoints" / folder_name(8), tmp_path / "kept")
    saved(tmp_path, process, 12)
    (tmp_path / "kept").rename(tmp_path / "checkpoints" / folder_name(8))
    for step in (10, 12):
        damaged(tmp_path, step)
    again = manager(tmp_path, process)
    assert again.find("auto", ()).folder.name == folder_name(8)
    again.save(OneParameter(), RunState(9))
    assert steps_in(tmp_path) == [9, 8]
    again.save(OneParameter(), RunState(12))
    assert steps_in(tmp_path) == [12, 9]


def test_what_is_later_than_the_run_takes_the_place_of_none(process, tmp_path):
    """As after going back to a checkpoint, where a later one is so damaged that its state cannot be read."""
    own = saved(tmp_path, process, 20, 30)
    own.save(OneParameter(), RunState(11))
    own.save(OneParameter(), RunState(12))
    assert steps_in(tmp_path) == [12, 11]


def test_the_same_command_goes_on_with_the_runs_own_checkpoints(process, tmp_path, capsys):
    """And not for ever from the one that it began with."""
    saved(tmp_path / "other", process, 5)
    for begin in (tmp_path / "other", tmp_path / "other" / "checkpoints" / folder_name(5)):
        run = tmp_path / f"run_{begin.name}"
        first = manager(run, process)
        assert first.find(str(begin), ()).folder.parent.parent == tmp_path / "other"
        first.save(OneParameter(), RunState(7))
        assert manager(run, process).find(str(begin), ()).folder == run / "checkpoints" / folder_name(7)
        said = capsys.readouterr().err
        assert f"passed over run.resume={begin}: the run has begun" in said
    shutil.rmtree(tmp_path / "other")
    assert manager(run, process).find(str(begin), ()).folder == run / "checkpoints" / folder_name(7)


def test_an_own_checkpoint_may_be_named_only_if_it_is_the_newest(process, tmp_path):
    """Else what is saved next would be older than what it went back behind, and removed at once."""
    own = saved(tmp_path / "run", process, 5, 7)
    older, newest = (tmp_path / "run" / "checkpoints" / folder_name(step) for step in (5, 7))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in (newest, tmp_path / "run", tmp_path / "link" / "checkpoints" / folder_name(7)):
        assert own.find(str(path), ()).folder == newest
    for path in (older, tmp_path / "link" / "checkpoints" / folder_name(5)):
        with pytest.raises(ConfigError, match="is not the newest of its run"):
            own.find(str(path), ())


def test_what_another_trainer_saved_is_named_with_the_command_that_converts_it(process, tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"kandinsky-dist checkpoint convert {folder} OUT"):
        manager(tmp_path / "run", process).find(str(folder), ())


def test_a_run_folder_behind_a_link_is_that_runs_own(process, tmp_path):
    saved(tmp_path / "real", process, 5, 7)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    own = manager(tmp_path / "link", process)
    assert own.find("auto", ()).folder.name == folder_name(7)
    own.save(OneParameter(), RunState(9))
    assert steps_in(tmp_path / "real") == [9, 7]


def test_of_a_checkpoint_behind_a_link_only_the_link_is_removed(process, tmp_path):
    own = saved(tmp_path / "run", process, 5)
    folder = tmp_path / "run" / "checkpoints" / folder_name(5)
    folder.rename(tmp_path / "archive")
    folder.symlink_to(tmp_path / "archive")
    for step in (7, 9):
        own.save(OneParameter(), RunState(step))
    assert steps_in(tmp_path / "run") == [9, 7]
    assert not folder.is_symlink()
    assert damage(tmp_path / "archive") is None


def test_what_cannot_be_removed_does_not_end_the_run(process, tmp_path, capsys):
    own = saved(tmp_path, process, 5)
    busy = tmp_path / "checkpoints" / folder_name(5) / "busy"
    busy.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", busy], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        for step in (7, 9):
            own.save(OneParameter(), RunState(step))
        assert f"{busy.parent} is no longer needed and cannot be removed" in capsys.readouterr().err
        assert not (busy.parent / COMMIT).exists()
        assert manager(tmp_path, process).find("auto", ()).folder.name == folder_name(9)
    finally:
        subprocess.run(["umount", "--lazy", busy], check=True)
    own.save(OneParameter(), RunState(11))
    assert steps_in(tmp_path) == [11, 9]


def test_a_checkpoint_that_is_removed_while_it_is_read_is_named(process, tmp_path):
    own = saved(tmp_path, process, 5)
    opened, unopened = (CheckpointReader(own.find("auto", ()).folder) for _ in range(2))
    assert opened.read("w", "master", 0, 2).tolist() == [1.0, 1.0]
    for step in (7, 9):  # of a run that goes on meanwhile
        own.save(OneParameter(), RunState(step))
    assert opened.read("w", "master", 2, 4).tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match="is gone or damaged since it was found"):
        unopened.read("w", "master", 0, 4)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        _ = unopened.state


def test_a_state_of_another_version_is_named(process, tmp_path):
    folder = saved(tmp_path, process, 5).find("auto", ()).folder
    state = json.loads((folder / STATE).read_text())
    state["run"]["phase_of_the_moon"] = 1
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="was it written by another version"):
        _ = CheckpointReader(folder).state


def test_a_second_save_waits_for_the_first(process, tmp_path):
    own = manager(tmp_path, process, is_async=True)
    for step in range(1, 30):
        own.save(OneParameter(), RunState(step))
    own.finish()
    assert steps_in(tmp_path) == [29, 28]
