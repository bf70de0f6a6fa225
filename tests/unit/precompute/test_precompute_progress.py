"""Progress counts what all have done since this process began."""

import re

from kandinsky_dist.precompute import progress
from kandinsky_dist.precompute.progress import Progress, summary
from kandinsky_dist.precompute.shard import Spent


def test_a_line_says_how_far_all_are_and_how_long_it_takes(monkeypatch, capsys):
    clock = iter([100.0, 101.0, 120.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    done = iter([400, 1400])  # before this process began, and 20 seconds later
    shown = Progress(2400, lambda: next(done), is_shown=True)
    shown.update(Spent(100, 10.0, 1.0))
    assert capsys.readouterr().err == ""  # a second later
    shown.update(Spent(300, 20.0, 2.0))
    line = capsys.readouterr().err
    assert "1,400 of 2,400 samples (58.3%), 50 samples/s, here 15 samples/s, ETA 0:00:20" in line


def test_nothing_is_counted_where_nothing_is_shown(capsys):
    Progress(10, lambda: 1 // 0, is_shown=False).update(Spent(5, 1.0, 0.0))
    assert capsys.readouterr().err == ""


def test_the_summary_says_what_was_waited_for():
    assert summary(Spent()) == "nothing left to do here"
    assert re.fullmatch(
        r"300 samples here at 15 samples/s, 25% of the time waiting .*", summary(Spent(300, 20.0, 5.0))
    )
