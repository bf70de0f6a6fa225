"""`bench comm` runs between processes of its own or a launcher's, and leaves record, page and picture."""

import json
from pathlib import Path

import pytest
from helpers import command as fresh
from helpers import forked
from helpers.forked import command

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.record import Record

pytestmark = pytest.mark.integration
SMALL = ("--size", "tiny", "--max-mib", 1, "--repeats", 1, "--bucket-mib", 1, 0.25, "--strategy", "ddp")

WAYS = [
    pytest.param(forked.command, id="forked"),
    pytest.param(fresh.command, id="fresh", marks=pytest.mark.campaign),
]
"""Processes forked from one that has imported everything, or interpreters that command and torchrun start."""


def check(out: Path, strategies: list[str]) -> str:
    """The page, after a look at what every record must have."""
    assert sorted(path.name for path in out.iterdir()) == ["comm.json", "comm.md", "comm.png"]
    rows = json.loads((out / "comm.json").read_text())["rows"]
    collectives = [row for row in rows if row["kind"] == "collective"]
    sizes = [4 * 2**10 * 4**power for power in range(5)]
    assert {(row["collective"], row["dtype"], row["num_bytes"]) for row in collectives} == {
        (name, dtype, size)
        for name in ("all-reduce", "reduce-scatter", "all-gather")
        for dtype in ("fp32", "bf16")
        for size in sizes
    }
    steps = [
        (row["strategy"], row["communication"], row["bucket_mib"]) for row in rows if row["kind"] == "step"
    ]
    cases = (("overlapped", 1.0), ("overlapped", 0.25), ("not overlapped", 1.0), ("none", None))
    assert steps == [(name, *case) for name in strategies for case in cases]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows)
    assert (out / "comm.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "comm.md").read_text()
    assert to_markdown(out / "comm.json") == page
    return page


@pytest.mark.parametrize("command", WAYS)
def test_alone_it_starts_its_own_ranks(command, tmp_path):
    done = command("bench", "comm", tmp_path / "out", *SMALL, "zero2")
    assert done.returncode == 0, done.stderr
    page = check(tmp_path / "out", ["ddp", "zero2"])
    assert done.stdout.endswith(page)
    assert "2 ranks on 1 machine over gloo" in page


@pytest.mark.parametrize("command", WAYS)
def test_under_torchrun_it_measures_between_the_ranks_that_are_there(command, tmp_path):
    done = command("bench", "comm", tmp_path / "out", *SMALL, world_size=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == check(tmp_path / "out", ["ddp"]), "rank 0 alone speaks"


def test_one_rank_is_refused(tmp_path):
    done = command("bench", "comm", tmp_path / "out", "--world-size", 1)
    assert (done.returncode, done.stderr) == (
        78,
        "--world-size 1 must be 2 or more: one rank has nobody to talk to\n",
    )


def test_the_pages_figures_are_the_records(tmp_path):
    def row(communication: str, bucket_mib: float | None, *milliseconds: float) -> dict[str, object]:
        times = [value / 1e3 for value in milliseconds]
        return {
            "kind": "step",
            "strategy": "ddp",
            "communication": communication,
            "bucket_mib": bucket_mib,
            "seconds": times,
        }

    setting = {
        "world_size": 4, "num_nodes": 1, "backend": "gloo", "num_repeats": 3, "size": "small",
        "num_parameters": 10, "precision": "float32", "micro_batch_size": 1, "strategies": ["ddp", "zero3"],
    }  # fmt: skip
    gathered = {"kind": "collective", "dtype": "fp32", "num_bytes": 2**20, "seconds": [2**20 / 1e9]}
    rows = [
        {**gathered, "collective": "all-reduce"},
        {**gathered, "collective": "all-gather"},
        # A machine that slows down: differences within the rounds are 20, 20 and 30; of the medians, 120.
        row("overlapped", 25.0, 120.0, 220.0, 330.0),
        row("not overlapped", 25.0, 180.0, 280.0, 380.0),
        row("none", None, 100.0, 200.0, 300.0),
        {**row("overlapped", 25.0, 99.0), "strategy": "zero3"},
    ]
    path = tmp_path / "comm.json"
    Record.now("comm", device="CPU", command="", setting=setting, rows=rows).save(path)
    page = " ".join(to_markdown(path).split())
    assert "| all-reduce | fp32 | 1 MiB | 1.049 | 1.00 | 1.50 |" in page  # 2 x 3/4
    assert "| all-gather | fp32 | 1 MiB | 1.049 | 1.00 | 0.75 |" in page
    assert "| ddp | overlapped | 25 | 220.0 | 120.0 | 330.0 | 20.0 | 9.1% |" in page
    assert "| ddp | not overlapped | 25 | 280.0 | 180.0 | 380.0 | 80.0 | 28.6% |" in page
    assert "| ddp | none | - | 200.0 | 100.0 | 300.0 | - | - |" in page
    assert "| zero3 | overlapped | 25 | 99.0 | 99.0 | 99.0 | - | - |" in page
