"""Processes that stay and take turns."""

import os

import psutil
import pytest
from dist.team_programs import count_steps

from kandinsky_dist.bench.teams import CaseFailedError, Team, Turn

pytestmark = pytest.mark.dist


@pytest.fixture
def team(tmp_path):
    """Makes teams and ends them."""
    made = []

    def make(case: dict, world_size: int = 1) -> Team:
        folder = tmp_path / str(len(made))
        made.append(Team(count_steps, case, world_size, folder, is_on_cpu=True))
        return made[-1]

    yield make
    for item in made:
        item.close()
    assert not [
        child.cmdline() for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())
    ]


def test_cases_alternate_in_processes_that_stay(team, tmp_path):
    first, second = team({}), team({})
    assert (first.wait_ready(), second.wait_ready()) == ({"rank": 0}, {"rank": 0})
    results = [item.take(Turn(1, 2))[0] for _ in range(2) for item in (first, second)]
    assert results[0]["process"] == results[2]["process"]
    assert results[1]["process"] == results[3]["process"]
    assert len({os.getpid(), results[0]["process"], results[1]["process"]}) == 3
    # One step to warm up, then two on the clock, in each of two turns.
    assert results[2]["events"] == [
        "step 1",
        "clock",
        "step 2",
        "step 3",
        "step 4",
        "clock",
        "step 5",
        "step 6",
    ]
    assert all(result["step_seconds"] > 0 for result in results)
    assert first.take(Turn(0, 1, "silent"))[0]["kind"] == "silent"
    first.close()
    assert (tmp_path / "0" / "over").exists(), "it was told that there are no more turns"


def test_every_rank_takes_part(team):
    both = team({}, world_size=2)
    assert both.wait_ready() == {"rank": 0}
    assert len({result["process"] for result in both.take(Turn(0, 1))}) == 2


def test_a_rank_that_is_killed_ends_the_case_with_its_last_words(team):
    both = team({"dies_at": 3, "rank": "1"}, world_size=2)
    both.wait_ready()
    both.take(Turn(0, 2))
    with pytest.raises(CaseFailedError, match="a process has ended: these are its last words"):
        both.take(Turn(0, 2))


def test_a_case_that_cannot_start_says_why_in_one_line(team):
    with pytest.raises(CaseFailedError, match=r"^ValueError: no such network$"):
        team({"cannot_start": True}).wait_ready()
