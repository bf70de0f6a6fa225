"""`bench optimizer`: implementations take turns on the same weights, and are held to torch's for-loop."""

import pytest
from helpers.forked import command

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.optimizer import LAYOUTS
from kandinsky_dist.bench.record import Record

pytestmark = pytest.mark.integration


def test_a_row_for_each_layout_and_implementation(tmp_path):
    arguments = ("--size", "tiny", "--stage", "prior", "--repeats", "2", "--contender", "torch")
    done = command("bench", "optimizer", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    record = Record.load(tmp_path / "optimizer.json")
    assert [(row["layout"], row["implementation"]) for row in record.rows] == [
        (layout, f"torch {name}") for layout in LAYOUTS for name in ("fused", "foreach", "for-loop")
    ]
    for row in record.rows:
        assert row["device"] == "cpu"
        assert row["seconds"] > 0
        assert row["difference"] < 1e-2
    assert len({row["num_parameters"] for row in record.rows}) == 1
    page = (tmp_path / "optimizer.md").read_text("utf-8")
    assert page == done.stdout == to_markdown(tmp_path / "optimizer.json")
    assert "--repeats 2 --contender 'torch'" in page


def test_an_unknown_name_is_one_line(tmp_path):
    done = command("bench", "optimizer", tmp_path / "out", "--size", "tiny", "--contender", "apex")
    assert done.returncode == 78
    assert done.stderr.strip().endswith("--contender apex: no implementation begins so")
    assert not (tmp_path / "out").exists()
