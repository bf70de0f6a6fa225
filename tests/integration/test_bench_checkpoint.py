"""`bench checkpoint`: both kinds of saves are measured on real checkpoints, of which nothing is left."""

import pytest
from helpers.forked import command

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.checkpoint import MODES
from kandinsky_dist.bench.record import Record

pytestmark = pytest.mark.integration


def test_a_row_for_each_strategy_and_mode(tmp_path):
    arguments = ("--size", "tiny", "--strategy", "ddp", "--repeats", "1")
    done = command("bench", "checkpoint", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    record = Record.load(tmp_path / "checkpoint.json")
    assert [(row["strategy"], row["mode"]) for row in record.rows] == [("ddp", mode) for mode in MODES]
    waited_for, beside = record.rows
    assert waited_for["bytes"] == pytest.approx(beside["bytes"], rel=0.01)
    assert waited_for["bytes"] > 2**20
    assert waited_for["num_steps_beside"] == 0
    for row in record.rows:
        assert row["stall_seconds"] > 0
        assert row["commit_seconds"] > 0
    page = (tmp_path / "checkpoint.md").read_text("utf-8")
    assert page == done.stdout == to_markdown(tmp_path / "checkpoint.json")
    assert "--strategy ddp --world-size 2 --repeats 1" in page
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.json", "checkpoint.md"}
