"""A run stops while a checkpoint can still be written, and never begins one that cannot."""

import datetime
import time

import pytest

from kandinsky_dist.faults.time_left import TimeLeft, job_end


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_an_end_there_is_always_time():
    left = TimeLeft(None, 60.0, save_seconds=1e9)
    assert not left.must_stop()
    assert left.may_save()


@pytest.mark.parametrize(
    ("left_seconds", "must_stop", "may_save"), [(400, False, True), (259, True, True), (149, True, False)]
)
def test_a_stop_leaves_time_for_two_steps_a_checkpoint_and_the_margin(left_seconds, must_stop, may_save):
    clock = Clock()
    left = TimeLeft(2000.0, 60.0, clock=clock)
    left.saw_step()
    clock.now += 25  # a step and what came with it
    left.saw_step()
    clock.now += 5
    left.saw_step()
    left.saw_save(100.0)
    left.saw_save(10.0)  # the longest counts
    clock.now = 2000.0 - left_seconds
    assert left.needed_seconds == 150.0
    assert left.must_stop() == must_stop, "150 for the checkpoint, 2 x 25 for steps, 60 left over"
    assert left.may_save() == may_save


def test_what_an_earlier_start_measured_counts():
    assert not TimeLeft(1100.0, 0.0, save_seconds=100.0, clock=Clock()).may_save()
    assert TimeLeft(1100.0, 0.0, save_seconds=50.0, clock=Clock()).may_save()


def test_the_jobs_end_is_in_the_environment():
    assert job_end({"SLURM_JOB_END_TIME": "1795533791", "SLURM_JOB_ID": "7"}) == 1795533791.0


def test_without_a_job_there_is_no_end():
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_ID": "7", "PATH": "/nowhere"}) is None


@pytest.mark.parametrize(
    ("said", "expected"), [("2026-03-01T12:30:00", datetime.datetime(2026, 3, 1, 12, 30)), ("Unknown", None)]
)
def test_scontrol_is_asked_where_the_environment_says_nothing(said, expected, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "--oneliner show job 7" ] && echo "JobId=7 StartTime=2026-01-01T00:00:00 '
        f'EndTime={said} Deadline=N/A"\n'
    )
    program.chmod(0o755)
    environ = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert job_end(environ) == (expected and time.mktime(expected.timetuple()))


def test_a_scontrol_that_fails_is_no_end(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert job_end({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) is None
