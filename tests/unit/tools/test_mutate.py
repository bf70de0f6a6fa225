"""Single-fault edits and what runs the suite on them."""

import ast
import json
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.campaign import cases
from tools import mutate
from tools.changed import PACKAGE, ROOT, Selected
from tools.draws import draw
from tools.operators import edits_of

ROOMS = mutate.ROOMS.split(",")

SOURCE = b'''
"""Module: 1 < 2 and True."""
import logging
from typing import TYPE_CHECKING

SIZE = 3


class Shape:
    """Class: 1 < 2."""

    side: int = 4

    def __repr__(self):
        return str(self.side + 1)

    def area(self, scale: int = 2) -> int:
        """Function: 1 < 2."""
        assert scale > 0
        if scale > 10:
            raise ValueError(f"scale={scale + 1}: at most {10 + 1}")
        logging.info("scaled by %d", scale + 1)
        self.check(scale, indent=2)
        return min(self.side, 9) * scale


def ready(\xc3\xa4=1):
    if TYPE_CHECKING:
        return 7
    if \xc3\xa4 in CUDA:
        return 8
    return \xc3\xa4 <= 5 or True
    return None  # nothing < something
'''

EDITS = [
    "20:18 > -> >=",
    "20:20 10 -> 11",
    "23:9 call -> pass",
    "24:16 min -> max",
    "24:16 return x -> return None",
    "24:31 9 -> 10",
    "24:34 * -> //",
    "32:12 return x -> return None",
    "32:14 <= -> <",
    "32:17 5 -> 6",
    "32:19 or -> and",
    "32:22 True -> False",
]


def test_edits_are_on_executable_lines_only():
    assert [edit.id for edit in edits_of("a.py", SOURCE)] == [f"a.py:{edit}" for edit in EDITS]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a < b", "a <= b"),
        ("a is not b", "a is b"),
        ("a not in b", "a in b"),
        ("a and b", "a or b"),
        ("1 if a else b", "1 if not (a) else b"),
        ("a - b", "a + b"),
        ("a // b", "a * b"),
        ("max(a, b)", "min(a, b)"),
        ("[a, 7]", "[a, 8]"),
        ("f(False)", "f(True)"),
    ],
)
def test_an_operator_replaces_what_it_names(old, new):
    source = f"def f(a, b):\n    x = {old}\n".encode()
    assert f"def f(a, b):\n    x = {new}\n".encode() in [
        edit.applied(source) for edit in edits_of("a.py", source)
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "raise E(1 + a)",
        "say(a + 1)",
        "x = f(a, timeout=5)",
        "x = a + 'b'",
        "x = folder / a",
        "x = 2 * 3",
        "a.close()",
    ],
)
def test_no_edit_where_no_test_should_notice(statement):
    assert edits_of("a.py", f"def f(a):\n    {statement}\n".encode()) == []


def test_a_seed_draws_the_same_edits_again_from_all_rooms():
    edits = draw(ROOT, ROOMS, 3, 24)
    assert [edit.id for edit in draw(ROOT, ROOMS, 3, 16)] == [edit.id for edit in edits[:16]]
    assert [edit.path.split("/")[0] for edit in edits] == ROOMS * 3
    assert len({edit.id for edit in edits}) == 24
    assert {edit.id for edit in draw(ROOT, ROOMS, 4, 24)} != {edit.id for edit in edits}


@pytest.mark.parametrize("count", cases([16, 80], lambda count: count < 80))
def test_here_every_drawn_edit_compiles_and_differs_in_one_place_outside_of_docstrings(count):
    for edit in draw(ROOT, ROOMS, 5, count):
        source = (ROOT / PACKAGE / edit.path).read_bytes()
        edited = edit.applied(source)
        compile(edited, edit.path, "exec")
        before, after = ast.parse(source), ast.parse(edited)
        assert ast.dump(before) != ast.dump(after), edit.id
        assert edited == source[: edit.start] + edit.new + source[edit.end :]
        removed = [line for line in edit.diff(source).splitlines() if line.startswith("- ")]
        start_line = source.count(b"\n", 0, edit.start)
        assert [line[2:] for line in removed] == source.decode().splitlines()[start_line:][: len(removed)]
        assert _docstrings(before) == _docstrings(after), edit.id


def test_the_nearest_tests_of_a_tier_are_run_before_its_others():
    distances = {"a": (1, "unit"), "b": (1, "unit"), "c": (2, "unit"), "d": (3, "process"), "e": (3, "slurm")}
    selected = [Selected(distance, tier, path) for path, (distance, tier) in distances.items()]
    assert mutate.grouped(selected, ["unit", "process"]) == [
        ("unit", ["a", "b"]),
        ("unit", ["c"]),
        ("process", ["d"]),
    ]


def _docstrings(tree):
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)]


def test_here_no_two_edits_of_a_file_have_the_same_id():
    for path in (ROOT / PACKAGE / "data").rglob("*.py"):
        ids = [edit.id for edit in edits_of(path.name, path.read_bytes())]
        assert len(set(ids)) == len(ids), path


@pytest.mark.integration
def test_a_run_reports_what_the_tests_catch_and_what_survives(tmp_path, capsys, monkeypatch):
    root = tmp_path / "checkout"
    sources = {
        "kandinsky_dist/__init__.py": "",
        "kandinsky_dist/data/__init__.py": "",
        "kandinsky_dist/data/sums.py": (
            "def add(a, b):\n    x = a + b\n    return x\n\n\ndef forget(a):\n    a.clear_all()\n"
        ),
        "tests/unit/test_sums.py": (
            "from kandinsky_dist.data import sums\n\n\ndef test_add():\n    assert sums.add(2, 1) == 3\n\n\n"
            "def test_always_fails():\n    assert sums is None\n"
        ),
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", str(root)], check=True, capture_output=True)
    out = tmp_path / "out.jsonl"
    words = ["run", "--root", str(root), "--rooms", "data", "--out", str(out), "--", "-n", "0"]

    assert mutate.main(words) == 1
    records = {
        record["id"].partition(" ")[2]: record for record in map(json.loads, out.read_text().splitlines())
    }
    caught = "tests/unit/test_sums.py::test_add"
    assert {what: (record["outcome"], record["by"]) for what, record in records.items()} == {
        "+ -> -": ("caught", caught),
        "return x -> return None": ("caught", caught),
        "call -> pass": ("survived", ""),
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-1] == ["survived: data/sums.py:7:5 call -> pass", "-     a.clear_all()", "+     pass"]
    assert lines[-1] == "caught 2 of 3 (0 by time-out), survived 1, unfinished 0"
    assert {name: (root / name).read_text() for name in sources} == sources

    def no_copy(root: Path) -> None:
        raise AssertionError("all edits have a record")

    monkeypatch.setattr(mutate, "Copy", no_copy)
    assert mutate.main(words) == 1
    assert capsys.readouterr().out.splitlines() == lines[3:]


@pytest.mark.integration
def test_an_edit_that_hangs_ends_at_the_limit_with_all_its_processes(tmp_path, capsys):
    root = tmp_path / "checkout"
    sources = {
        "kandinsky_dist/__init__.py": "",
        "kandinsky_dist/data/__init__.py": "",
        "kandinsky_dist/data/ends.py": "def is_over(a):\n    return a == 1\n",
        "tests/unit/test_ends.py": (
            "import os, subprocess, sys, time\nfrom pathlib import Path\n"
            "from kandinsky_dist.data.ends import is_over\n\n\ndef test_ends():\n"
            "    while not is_over(1):\n"
            "        child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
            f"        Path({str(tmp_path)!r}, 'child').write_text(str(child.pid))\n"
            "        time.sleep(600)\n"
        ),
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", str(root)], check=True, capture_output=True)
    ids = [edit.what for edit in draw(root, ["data"], 0, 9)]
    words = ["run", "--root", str(root), "--rooms", "data", "--out", str(tmp_path / "out"), "--limit", "6"]
    assert mutate.main([*words, "--only", str(ids.index("== -> !=") + 1), "--", "-n", "0"]) == 0
    assert "caught 1 of 1 (1 by time-out)" in capsys.readouterr().out
    child = int((tmp_path / "child").read_text())
    with suppress(psutil.NoSuchProcess):  # ended, and maybe not yet reaped by its new parent
        assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE
