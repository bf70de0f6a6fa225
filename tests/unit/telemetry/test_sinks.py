import json
import math
import os
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.telemetry.sinks import AuditLog, JsonLines, TensorBoard, open_sinks, read_metrics


def write_all(path, entries):
    sink = JsonLines(path)
    for entry in entries:
        sink.write(entry)
    sink.close()


def test_entries_come_back_as_they_were_written(tmp_path):
    entries = [{"step": 1, "loss": 0.1 + 0.2, "epoch": 0}, {"step": 2, "loss": 1e-30, "epoch": 1}]
    write_all(tmp_path / "run" / "metrics.jsonl", entries)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == entries


def test_last_entry_of_a_step_counts_after_a_restart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_all(
        path, [{"step": 10, "loss": 5.0, "mfu": 0.5}, {"step": 20, "loss": 4.0}, {"step": 30, "loss": 3.0}]
    )
    write_all(path, [{"step": 10, "loss": 5.5}, {"step": 20, "loss": 4.5}])
    assert len(path.read_text().splitlines()) == 5, "nothing is deleted"
    assert read_metrics(path) == [
        {"step": 10, "loss": 5.5},
        {"step": 20, "loss": 4.5},
        {"step": 30, "loss": 3.0},
    ]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "x" * 200_000])
def test_torn_last_line_is_ignored_by_readers_and_cut_off_on_open(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_all(path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    with open(path, "a") as file:
        file.write(torn)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    write_all(path, [{"step": 3, "loss": 1.25}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_file_that_holds_only_a_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    JsonLines(path).close()
    assert path.read_bytes() == b""
    assert read_metrics(path) == []


def test_broken_line_in_the_middle_is_named_not_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not an entry"):
        read_metrics(path)


def test_numbers_that_are_not_finite_keep_the_file_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_all(path, [{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
    assert math.isnan(read_metrics(path)[0]["loss"])


WRITER = """
import sys
from pathlib import Path
from kandinsky_dist.telemetry.sinks import JsonLines
sink = JsonLines(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    sink.write({"step": step, "loss": 1.0 / step, "samples_per_second": 1234.5})
    if step == 100:
        print("running", flush=True)
"""


def test_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= 100
    assert torn == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_an_error_not_a_silent_loss(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write({"step": 1})
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), sink._lines._file.fileno())
    with pytest.raises(OSError, match="No space left"):
        sink.write({"step": 2})
    sink._lines._file.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1]


def test_audit_log_names_the_samples_of_a_step(tmp_path):
    path = tmp_path / "audit" / "rank_0.jsonl"
    for keys in (["a", "b"], ["a", "c"]):  # the second start repeats the step
        log = AuditLog(path)
        log.write(7, keys)
        log.close()
    assert read_metrics(path) == [{"step": 7, "keys": ["a", "c"]}]
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 7, "keys": ["a", "b"]}


def read_scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_a_tag_a_key_over_steps(tmp_path):
    sink = TensorBoard(tmp_path)
    for step in (10, 20):
        sink.write({"step": step, "loss": 1.0 / step, "epoch": 0})
    sink.close()
    assert read_scalars(tmp_path, "loss") == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert read_scalars(tmp_path, "epoch") == [(10, 0.0), (20, 0.0)]
    with pytest.raises(KeyError):
        read_scalars(tmp_path, "step")


def test_tensorboard_shows_a_repeated_step_once_after_a_restart(tmp_path):
    for start, loss in ((10, 5.0), (20, 7.0)):
        sink = TensorBoard(tmp_path)
        for step in range(start, 40, 10):
            sink.write({"step": step, "loss": loss})
        sink.close()
    assert read_scalars(tmp_path, "loss") == [(10, 5.0), (20, 7.0), (30, 7.0)]


def test_tensorboard_shows_a_repeated_step_once_where_the_run_went_back(tmp_path):
    sink = TensorBoard(tmp_path)
    for step, loss in ((10, 5.0), (20, 6.0), (30, 99.0), (20, 7.0), (30, 8.0)):
        sink.write({"step": step, "loss": loss})
    sink.close()
    assert read_scalars(tmp_path, "loss") == [(10, 5.0), (20, 7.0), (30, 8.0)]


def test_run_folder_has_metrics_and_what_report_to_names(tmp_path):
    for report_to in ((), ("tensorboard",)):
        run_dir = tmp_path / str(len(report_to))
        sinks = open_sinks(run_dir, report_to)
        for sink in sinks:
            sink.write({"step": 1, "loss": 0.5})
            sink.close()
        assert read_metrics(run_dir / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
        assert (run_dir / "tensorboard").exists() == bool(report_to)


def test_unknown_sink_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"telemetry\.report_to=tensorbord is not a sink"):
        open_sinks(tmp_path, ["tensorbord"])
    assert not list(tmp_path.iterdir())
