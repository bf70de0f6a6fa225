import io

import pytest

from kandinsky_dist.telemetry.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_counts_only_the_rate_of_this_run():
    clock = Clock()
    progress = Progress(1000, 900, True, stream=io.StringIO(), clock=clock)
    clock.now += 60.0  # compilation, before the first step is done
    progress.update(901)
    assert progress.seconds_left() is None
    for step in range(902, 912):
        clock.now += 2.0
        progress.update(step)
    # 89 steps are left at 2 s each. Counting the 900 restored steps would give under 10 s.
    assert progress.seconds_left() == pytest.approx(178.0)


def test_log_file_gets_plain_lines_now_and_then_and_the_last_step():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, 0, True, line_every_seconds=30.0, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, loss=1.0 / step, samples_per_second=640.0)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[1] == "step 31/100 (31.0%), loss 0.03226, 640 samples/s, ETA 0:01:09"
    assert "\r" not in stream.getvalue()


def test_line_keeps_the_figures_of_the_last_log_entry():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 0, True, line_every_seconds=0.0, stream=stream, clock=clock)
    progress.update(1, loss=0.25, samples_per_second=8.0)
    progress.update(2)
    assert "loss 0.25, 8 samples/s" in stream.getvalue().splitlines()[1]


def test_terminal_gets_a_bar_that_starts_where_the_run_resumed():
    clock, stream = Clock(), Terminal()
    with Progress(200, 100, True, stream=stream, clock=clock) as progress:
        assert "100/200 steps" in stream.getvalue()
        for step in (101, 102, 103):
            clock.now += 10.0
            progress.update(step, loss=0.5, samples_per_second=12.0)
    final = stream.getvalue().rpartition("\r")[2]
    assert "103/200 steps, loss 0.5, 12 samples/s, ETA 0:16:10" in final, repr(final)


@pytest.mark.parametrize("stream_class", [io.StringIO, Terminal])
def test_other_ranks_show_nothing(stream_class):
    stream = stream_class()
    with Progress(10, 0, False, stream=stream) as progress:
        progress.update(1, loss=1.0, samples_per_second=1.0)
    assert stream.getvalue() == ""
