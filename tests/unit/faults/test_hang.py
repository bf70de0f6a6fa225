"""A hang is told from a slow step, and the rank that did not arrive is named."""

from dataclasses import replace

import pytest

from kandinsky_dist.faults.hang import judge
from kandinsky_dist.faults.heartbeat import Beat

NOW = 10_000.0


def beats(number: int) -> dict[int, Beat]:
    """Ranks that wait in the step for 5 of at most 60 seconds, and were heard of just now."""
    return {
        rank: Beat(
            rank=rank, host=f"n{rank // 2}", pid=100 + rank, count=7, time=NOW - 1, every_seconds=5.0,
            step=17, phase="compute", moves=90, phase_seconds=5.0, limit_seconds=60.0, silence_seconds=60.0,
        )
        for rank in range(number)
    }  # fmt: skip


def later(before: dict[int, Beat], *, silent=(), **changes) -> dict[int, Beat]:
    """The next reading: all have beaten again but for the silent; changes apply to rank_0=..., and so on."""
    after = {rank: beat if rank in silent else replace(beat, count=9) for rank, beat in before.items()}
    for name, values in changes.items():
        rank = int(name.removeprefix("rank_"))
        after[rank] = replace(after[rank], **values)
    return after


def test_a_slow_step_is_no_hang():
    before = beats(4)
    assert judge(before, later(before, rank_2={"phase_seconds": 59.0}), NOW, 4) is None


def test_the_rank_that_is_behind_is_named_with_its_phase():
    before = beats(4)
    waiting = {"phase_seconds": 300.0, "moves": 91}
    found = judge(
        before,
        later(
            before, rank_0=waiting, rank_1=waiting, rank_3=waiting,
            rank_2={"phase": "data", "phase_seconds": 301.0},
        ),
        NOW,
        4,
    )  # fmt: skip
    assert found.ranks == (2,)
    assert found.line == (
        "hang: rank 2 (n1, process 102) in data after step 17 for 301 s, more than its limit of 60 s; the "
        "other 3 wait for it"
    )


def test_ranks_that_wait_for_one_who_may_still_take_longer_go_on():
    """Rank 0 is still saving, which may take an hour; the others have gone on to the next step."""
    before = beats(4)
    overdue = {"phase_seconds": 300.0, "moves": 91}
    after = later(
        before, rank_1=overdue, rank_2=overdue, rank_3=overdue,
        rank_0={"phase": "save", "phase_seconds": 301.0, "limit_seconds": 3600.0},
    )  # fmt: skip
    assert judge(before, after, NOW, 4) is None


def test_who_says_nothing_is_named_not_those_who_wait():
    before = beats(4)
    before[3] = replace(before[3], time=NOW - 61)
    overdue = {"phase_seconds": 70.0}
    after = later(before, silent=(3,), rank_0=overdue, rank_1=overdue, rank_2=overdue)
    found = judge(before, after, NOW, 4)
    assert found.ranks == (3,)
    assert (
        "rank 3 (n1, process 103) said nothing for 61 s; last heard of in compute after step 17" in found.line
    )


def test_nobody_is_blamed_before_a_silent_rank_has_had_its_time():
    before = beats(4)
    before[3] = replace(before[3], time=NOW - 50)
    overdue = {"phase_seconds": 70.0}
    after = later(before, silent=(3,), rank_0=overdue, rank_1=overdue, rank_2=overdue)
    assert judge(before, after, NOW, 4) is None


def test_a_clock_that_is_wrong_makes_nobody_silent():
    before = beats(2)
    before[1] = replace(before[1], time=NOW - 4000)
    assert judge(before, later(before), NOW, 2) is None


def test_all_that_wait_for_one_another_are_said_to_be_together():
    before = beats(3)
    overdue = {"phase_seconds": 70.0}
    found = judge(before, later(before, rank_0=overdue, rank_1=overdue, rank_2=overdue), NOW, 3)
    assert found.ranks == ()
    assert "all 3 ranks have been in compute after step 17 for 70 s" in found.line
    assert "none is behind" in found.line


def test_a_rank_that_ended_without_the_others_is_named_with_its_reason():
    before = beats(2)
    after = later(
        before, rank_0={"phase_seconds": 70.0}, rank_1={"exit_code": 1, "line": "out of memory on rank 1"}
    )
    found = judge(before, after, NOW, 2)
    assert found.ranks == (1,)
    assert found.line.endswith("ended with 1 and the other 1 wait for it: out of memory on rank 1")


def test_a_rank_that_never_beat_is_named():
    before = beats(2)
    found = judge(before, later(before, rank_0={"phase_seconds": 70.0}), NOW, 3)
    assert found.ranks == (2,)


@pytest.mark.parametrize("silence", [0.0, 1e9])
def test_without_a_limit_nothing_is_a_hang(silence):
    before = {
        rank: replace(beat, limit_seconds=0.0, silence_seconds=silence, time=0.0)
        for rank, beat in beats(2).items()
    }
    assert judge(before, later(before, silent=(1,), rank_0={"phase_seconds": 1e6}), NOW, 2) is None


def test_a_thousand_ranks_are_named_in_one_line():
    before = {rank: replace(beat, time=NOW - 100) for rank, beat in beats(1000).items()}
    found = judge(before, before, NOW, 1000)
    assert len(found.ranks) == 1000
    assert "and 992 more said nothing" in found.line
