import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.patterns import expand_braces, resolve_shards, tars_below
from kandinsky_dist.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Empty tars in nested and hidden folders; the working directory is above them."""
    for name in (
        "c/b.tar", "c/a.tar", "c/a.tar.idx", "c/notes.txt", "c/deep/er/c.tar", "c/deep-2/a.tar",
        "c/.hidden/x.tar", "c/.x.tar",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_means_all_tars_below_it(tree):
    names = ["a.tar", "b.tar", "deep/er/c.tar", "deep-2/a.tar"]
    assert tars_below(Path("c")) == names
    assert resolve_shards("c") == [f"c/{name}" for name in names]
    assert resolve_shards(f"{tree}/c/") == [f"{tree}/c/{name}" for name in names]


def test_links_are_followed_but_not_in_circles(tree):
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere" / "z.tar").touch()
    os.symlink(tree / "elsewhere", tree / "c" / "linked")
    os.symlink(tree / "c", tree / "c" / "deep" / "up")
    assert resolve_shards("c")[-1] == "c/linked/z.tar"
    assert len(resolve_shards("c")) == 5


def test_globs_at_any_depth(tree):
    assert resolve_shards("c/*") == ["c/a.tar", "c/b.tar"]
    assert resolve_shards("c/**/*.tar") == ["c/a.tar", "c/b.tar", "c/deep-2/a.tar", "c/deep/er/c.tar"]
    assert resolve_shards("c/{deep-2,deep/*}/?.tar") == ["c/deep-2/a.tar", "c/deep/er/c.tar"]


def test_lists_are_relative_to_their_folder(tree):
    (tree / "c" / "list.txt").write_text(
        f"# some\nb.tar\n\n{tree}/c/a.tar\ndeep/*/c.tar\nhttps://host/{{1..2}}.tar?key=1\n"
    )
    assert resolve_shards("c/list.txt") == [
        "c/b.tar", f"{tree}/c/a.tar", "c/deep/er/c.tar", "https://host/1.tar?key=1", "https://host/2.tar?key=1",
    ]  # fmt: skip


def test_gaps_in_a_numbering_are_counted_and_named(tree, caplog):
    for number in (0, 7, 99):
        (tree / f"{number:05d}.tar").touch()
    with caplog.at_level(logging.WARNING):
        assert resolve_shards("{00000..00099}.tar") == ["00000.tar", "00007.tar", "00099.tar"]
    assert caplog.messages == ["shards={00000..00099}.tar: 97 of 100 numbers have no shard, first 00001.tar"]
    with pytest.raises(DataError, match=r"none of the 10 shards exists, first 10100\.tar"):
        resolve_shards("{10100..10109}.tar")


def test_remote_patterns_are_expanded_unseen():
    for scheme in ("http", "https", "s3"):
        found = resolve_shards(f"{scheme}://host/x/{{008..010}}.tar")
        assert found == [f"{scheme}://host/x/{number}.tar" for number in ("008", "009", "010")]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("nowhere", "does not exist; give a folder of .tar shards, a glob or a list file"),
        ("c/notes.md", "is not a folder; give a folder of .tar shards, a glob or a list file"),
        ("nowhere/*.tar", "names no .tar shards; to make some: kandinsky-dist data pack"),
        ("c/deep-3", "names no .tar shards"),
        ("c/notes.txt", "names no .tar shards"),
        ("nowhere.txt", "No such file"),
        ("c/{a,a}.tar", "names c/a.tar twice; list each shard once"),
        ("pipe:cat c/a.tar", "data.allow_pipe=true"),
        ("c/piped.txt", "a list holds files and URLs only"),
        ("ftp://host/a.tar", "only http://, https:// and s3:// URLs"),
        ("https://host/folder/", r"like https://host/folder/\{00000\.\.00999\}\.tar"),
        ("c/{0..99999999999}.tar", "names more than 10,000,000 shards"),
    ],
)
def test_errors_are_one_line(tree, shards, words):
    (tree / "c" / "deep-3").mkdir()
    (tree / "c" / "notes.md").touch()
    (tree / "c" / "piped.txt").write_text("pipe:cat a.tar\n")
    with pytest.raises(DataError, match=words) as caught:
        resolve_shards(shards, "data.shards")
    assert str(caught.value).startswith(("data.shards=", "c/{0"))
    assert "\n" not in str(caught.value)


@given(first=st.integers(0, 300), last=st.integers(0, 300), width=st.integers(1, 5))
def test_spans(first, last, width):
    names = expand_braces(f"a{{{first:0{width}d}..{last:0{width}d}}}b")
    numbers = [int(name[1:-1]) for name in names]
    step = 1 if last >= first else -1
    assert numbers == list(range(first, last + step, step))
    if f"{first:0{width}d}".startswith("0"):
        assert all(len(name) - 2 >= width for name in names)


def test_several_braces():
    assert expand_braces("{a,b}/{1..2}.{tar}") == ["a/1.{tar}", "a/2.{tar}", "b/1.{tar}", "b/2.{tar}"]
