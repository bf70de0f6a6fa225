"""What a rollback makes void is never continued from, and everything else is, at the new position."""

import json

import pytest

from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    CONFIG,
    STATE,
    RunState,
    SavedState,
    checksum,
    read_state,
    write_state,
)
from kandinsky_dist.checkpoint.manager import checkpoints_of, newest_whole
from kandinsky_dist.checkpoint.rollback import ROLLBACK, Rollback, read_rollback, write_rollback
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.faults.divergence import Health

SECOND = Rollback(
    number=2, step=45, diverged_since_step=33, reason="seen", to_step=20, first_position=300,
    last_position=449, num_bad_samples=7, identity={},
)  # fmt: skip


def save(folder, step, num_rollbacks):
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = RunState(step=step, samples_consumed=step * 10 + 100, num_rollbacks=num_rollbacks)
    write_state(path / STATE, SavedState(state, {}, {}))
    (path / CONFIG).write_text("")
    files = {name: checksum(path / name) for name in (STATE, CONFIG)}
    (path / COMMIT).write_text(json.dumps({"files": files}))


def test_checkpoints_of_the_bad_stretch_are_left_out_and_those_of_after_are_not(tmp_path):
    for step, num_rollbacks in ((10, 0), (20, 1), (30, 1), (40, 1)):
        save(tmp_path, step, num_rollbacks)
    assert newest_whole(tmp_path).folder.name == "step_00000040"
    assert newest_whole(tmp_path, at_most_step=32).folder.name == "step_00000030"
    write_rollback(tmp_path, SECOND)
    assert read_rollback(tmp_path) == SECOND
    assert newest_whole(tmp_path).folder.name == "step_00000020"
    (tmp_path / "step_00000020" / STATE).write_text("damaged")
    assert newest_whole(tmp_path).folder.name == "step_00000010"
    save(tmp_path, 35, 2)
    assert newest_whole(tmp_path).folder.name == "step_00000035"
    assert len(checkpoints_of(tmp_path)) == 5, "looking removes nothing"


def test_void_checkpoints_are_no_damage_that_forbids_a_new_start(tmp_path):
    save(tmp_path, 30, 1)
    write_rollback(tmp_path, SECOND)
    assert newest_whole(tmp_path).folder is None


def test_a_state_from_before_goes_on_behind_the_stretch_and_one_from_after_as_it_is():
    before = RunState(step=20, samples_consumed=300, num_rollbacks=1, health=Health(last_healthy_step=18))
    after = SECOND.continued(before)
    assert (after.step, after.samples_consumed, after.num_bad_samples) == (20, 450, 7)
    assert (after.num_rollbacks, after.health.last_healthy_step) == (2, 18)
    assert SECOND.continued(after) is after


def test_an_unreadable_record_stops_the_run(tmp_path):
    (tmp_path / ROLLBACK).write_text('{"number": 1')
    with pytest.raises(CheckpointError, match=r"rollback\.json says which checkpoints hold diverged"):
        newest_whole(tmp_path)


def test_states_from_before_there_was_a_guard_are_healthy_up_to_their_step(tmp_path):
    old = {"step": 7, "samples_consumed": 70, "pending_losses": [1.0], "num_bad_samples": 0}
    (tmp_path / STATE).write_text(json.dumps({"run": old, "identity": {}, "versions": {}}))
    state = read_state(tmp_path).run
    assert state.health == Health(last_healthy_step=7)
    assert state.num_updates == 7


def test_health_and_pending_steps_come_back_as_they_were(tmp_path):
    state = RunState(
        step=9, samples_consumed=90, pending_losses=[1.0, 2.0], pending_skipped=[False, True],
        num_skipped_steps=3, health=Health(6, 1, 2, [0.1, 0.3]),
    )  # fmt: skip
    write_state(tmp_path / STATE, SavedState(state, {}, {}))
    assert read_state(tmp_path).run == state
    assert state.num_updates == 5
