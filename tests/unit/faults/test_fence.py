"""A run folder belongs to its newest start; an older one finds out before it writes."""

import pytest

from kandinsky_dist.errors import FencedError, explained
from kandinsky_dist.faults.fence import OWNER, Fence, read_owner
from kandinsky_dist.faults.heartbeat import Beat, beat_every_seconds, read_beats, start_folder, write_beat


def claimed(run_dir, **others) -> Fence:
    fence = Fence(run_dir)
    fence.join(fence.take(2, **others))
    return fence


def beat(**changes) -> Beat:
    values = {
        "rank": 0, "host": "n0", "pid": 1, "count": 3, "time": 5.0, "every_seconds": 1.0, "step": 4,
        "phase": "save", "moves": 9, "phase_seconds": 0.5, "limit_seconds": 60.0, "silence_seconds": 60.0,
    }  # fmt: skip
    return Beat(**{**values, **changes})


def test_starts_are_counted_and_the_newest_one_passes(tmp_path):
    first = claimed(tmp_path)
    first.check()
    second = claimed(tmp_path, environ={"SLURM_JOB_ID": "4711"})
    assert (first.start, second.start) == (1, 2)
    second.check()
    with pytest.raises(FencedError, match=r"was taken over by start 2 of this run .* job 4711\): this one"):
        first.check()


def test_two_starts_that_took_the_same_number_are_told_apart(tmp_path):
    first = Fence(tmp_path)
    owner = first.take(1)
    (tmp_path / OWNER).unlink()  # as if both had looked before either had written
    second = claimed(tmp_path)
    first.join(owner)
    assert first.start == second.start
    with pytest.raises(FencedError):
        first.check()


def test_who_is_fenced_off_is_not_started_again():
    assert explained(FencedError("x")) == ("x", 78)


def test_a_file_that_cannot_be_read_takes_nothing_away(tmp_path):
    fence = claimed(tmp_path)
    for content in (b"", b"{", b'{"start": 3}', b"[]"):
        (tmp_path / OWNER).write_bytes(content)
        assert read_owner(tmp_path) is None
        fence.check()
    (tmp_path / OWNER).unlink()
    fence.check()


def test_a_claim_that_nobody_made_is_not_checked(tmp_path):
    claimed(tmp_path)
    Fence(tmp_path).check()


def test_the_older_starts_heartbeats_go_and_how_long_it_took_to_save_stays(tmp_path):
    claimed(tmp_path)
    old = start_folder(tmp_path, 1)
    write_beat(old, beat(save_seconds=12.5))
    assert read_beats(old) == {0: beat(save_seconds=12.5)}
    claimed(tmp_path)
    assert read_owner(tmp_path).save_seconds == 12.5
    assert not old.exists()
    with pytest.raises(FileNotFoundError):
        write_beat(old, beat())
    claimed(tmp_path)  # which never saved
    assert read_owner(tmp_path).save_seconds == 12.5


def test_beats_that_cannot_be_read_are_left_out(tmp_path):
    write_beat(tmp_path, beat())
    write_beat(tmp_path, beat(rank=1, exit_code=75, line="stopped"))
    (tmp_path / "rank_00002.json").write_text('{"rank": 2, "ho')
    (tmp_path / "rank_00003.json").write_text('{"rank": 3}')
    (tmp_path / "rank_00004.tmp").write_text("")
    assert set(read_beats(tmp_path)) == {0, 1}
    assert read_beats(tmp_path / "nowhere") == {}


def test_many_ranks_beat_less_often():
    assert beat_every_seconds(10.0, 8) == 10.0
    assert 1024 / beat_every_seconds(10.0, 1024) <= 50
