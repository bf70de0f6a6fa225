"""What `kandinsky-dist status` says of a run folder, whatever state its files are in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kandinsky_dist.cli import main
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.faults.fence import OWNER, Fence, read_owner
from kandinsky_dist.faults.heartbeat import Beat, start_folder, write_beat
from kandinsky_dist.status.collect import TAIL_BYTES, collect, last_entries
from kandinsky_dist.status.text import lines

NOW = 5_000.0


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of 2 ranks at step 40 of 100, two minutes old."""
    (tmp_path / "config.yaml").write_text("stage: prior\nrun:\n  max_steps: 100  # command line\n")
    Fence(tmp_path).take(2)
    owner = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**owner, "began": NOW - 120, "host": "n0"}))
    beats(tmp_path)
    log(tmp_path, range(10, 50, 10))
    return tmp_path


def beats(run_dir: Path, *changes: dict) -> None:
    """Both ranks beat, the one after the other with its changes."""
    beat = Beat(
        rank=0, host="n0", pid=1, count=3, time=NOW - 2, every_seconds=10.0, step=41, phase="compute",
        moves=90, phase_seconds=0.5, limit_seconds=600.0, silence_seconds=600.0,
    )  # fmt: skip
    for rank in range(2):
        changed = changes[rank] if rank < len(changes) else {}
        write_beat(start_folder(run_dir, read_owner(run_dir).start), replace(beat, rank=rank, **changed))


def log(run_dir: Path, steps, **others) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in steps:
            entry = {"step": step, "loss": 0.5, "step_seconds": 2.0, "samples_per_second": 32.0, **others}
            file.write(json.dumps(entry) + "\n")


def test_a_run_under_way(run_dir):
    found = collect(run_dir, NOW)
    assert (found.state, found.step, found.max_steps) == ("running", 41, 100)
    assert found.eta_seconds == (100 - 41) * 2.0
    assert found.num_restarts == 0
    text = "\n".join(lines(found))
    assert "running: in compute for 2 s" in text
    assert "41 of 100 (41.0%), ETA 0:01:58" in text
    assert "loss 0.5, rate 32 samples/s" in text
    assert "checkpoint    none yet" in text


@pytest.mark.parametrize(
    ("first", "second", "state", "detail"),
    [
        ({}, {"time": NOW - 100}, "stalled", "1 of 2 ranks say nothing: 1 (n0)"),
        ({"time": NOW - 90}, {"time": NOW - 100}, "lost", "no rank has said anything for 90 s"),
        ({"exit_code": 0}, {"exit_code": 0}, "finished", ""),
        ({"exit_code": 75, "line": "stopped on request"}, {"exit_code": 75}, "stopped", "stopped on request"),
        (
            {"exit_code": 1, "line": "peer"},
            {"exit_code": 65, "line": "bad shard"},
            "failed",
            "bad shard (exit",
        ),
        (
            {"exit_code": 75},
            {"exit_code": 1, "line": "out of memory"},
            "failed",
            "out of memory (exit code 1)",
        ),
        ({"exit_code": 1, "line": "hang"}, {"time": NOW - 100}, "failed", "hang (exit code 1)"),
        ({}, {"exit_code": 1, "line": "x"}, "stalled", "1 of 2 ranks say nothing"),
    ],
)
def test_states(run_dir, first, second, state, detail):
    beats(run_dir, first, second)
    found = collect(run_dir, NOW)
    assert found.state == state
    assert found.detail.startswith(detail)


def test_half_a_last_line_and_damage_are_passed_over(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('not json\n[]\n{"loss": 1}\n{"step": 50, "lo')
    assert collect(run_dir, NOW).figures["step"] == 40


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "text": "x" * 1000}) + "\n"
    path.write_text(line * 2000 + json.dumps({"step": 2}) + "\n")
    found = last_entries(path)
    assert found[-1] == {"step": 2}
    assert 0.9 * TAIL_BYTES < sum(map(len, map(json.dumps, found))) < TAIL_BYTES
    assert last_entries(tmp_path / "nowhere") == []


def test_what_the_run_has_gone_through(run_dir):
    log(run_dir, [50, 60], rollbacks=2, bad_samples=7, straggler_rank=1, straggler_excess=0.2, mfu=None)
    Fence(run_dir).take(2)
    beats(run_dir)
    found = collect(run_dir, NOW)
    assert (found.num_restarts, found.num_rollbacks, found.num_bad_samples) == (1, 2, 7)
    assert found.stragglers == {1: 2}
    text = "\n".join(lines(found))
    assert "1 restart, 2 rollbacks, 7 bad samples" in text
    assert "rank 1 (2 times)" in text
    assert "MFU" not in text


def test_checkpoints_by_their_sizes(run_dir):
    folder = run_dir / "checkpoints" / "step_00000040"
    folder.mkdir(parents=True)
    (folder.with_name("step_00000050.1.tmp")).mkdir()
    (folder.with_name("step_00000045")).mkdir()  # without COMMIT it is none
    (folder / "state.json").write_text("12345")
    (folder / "COMMIT").write_text(json.dumps({"files": {"state.json": {"bytes": 5, "sha256": ""}}}))
    found = collect(run_dir, NOW)
    assert (found.last_checkpoint, found.last_checkpoint_problem) == ("step_00000040", None)
    assert found.is_writing
    (folder / "state.json").write_text("1234")
    assert "state.json has 4 bytes, 5 were written" in "\n".join(lines(collect(run_dir, NOW)))
    (folder / "state.json").unlink()
    assert collect(run_dir, NOW).last_checkpoint_problem == "state.json: No such file or directory"


def test_a_folder_of_an_earlier_version_and_one_that_is_no_run(run_dir, tmp_path):
    (run_dir / OWNER).unlink()
    found = collect(run_dir, NOW)
    assert (found.state, found.step) == ("unknown", 40)
    (run_dir / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is no run folder"):
        collect(run_dir, NOW)


def test_a_start_that_has_not_beaten_yet(run_dir):
    Fence(run_dir).take(2)
    began = read_owner(run_dir).began
    assert collect(run_dir, began + 1).state == "running"
    assert collect(run_dir, began + 1).step == 40
    assert collect(run_dir, began + 1000).state == "lost"


def test_the_command_prints_text_or_json(run_dir, capsys):
    beats(run_dir, {"exit_code": 0}, {"exit_code": 0})
    assert main(["status", str(run_dir), "--watch"]) == 0, "a run that has ended is not watched on"
    assert "finished" in capsys.readouterr().out
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert main(["status", str(run_dir / "nowhere")]) == 78
