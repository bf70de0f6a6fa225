"""Fragments are read back by range, whoever wrote them; what is not whole is not a checkpoint."""

import itertools
import json
import random

import pytest
import torch
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.checkpoint.inspect import describe
from kandinsky_dist.checkpoint.layout import (
    COMMIT,
    CONFIG,
    STATE,
    CheckpointReader,
    RankTensors,
    checksum,
    damage,
    write_tensors,
)
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.errors import CheckpointError
from kandinsky_dist.parallel.base import FRAGMENT_KINDS, Fragment


def write(folder, values, cuts):
    """Cuts a parameter at `cuts` and gives the pieces to ranks in a shuffled order."""
    edges = [0, *sorted(set(cuts)), len(values)]
    pieces = [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
    random.Random(0).shuffle(pieces)
    for rank, (start, stop) in enumerate(pieces):
        parts = [values[start:stop] + kind for kind in range(len(FRAGMENT_KINDS))]
        saved = RankTensors.of([Fragment("w", start, len(values), *parts)])
        write_tensors(folder / f"rank_{rank:05d}.safetensors", saved)


@examples(30)
@given(data=st.data())
def test_any_range_is_read_back_however_it_was_cut(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    size = data.draw(st.integers(1, 40))
    values = torch.arange(float(size))
    write(folder, values, data.draw(st.lists(st.integers(0, size), max_size=5)))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    reader = CheckpointReader(folder)
    assert reader.numels == {"w": size}
    for number, kind in enumerate(FRAGMENT_KINDS):
        assert torch.equal(reader.read("w", kind, start, stop), values[start:stop] + number)


def test_a_missing_piece_is_an_error_and_not_zeros(tmp_path):
    write(tmp_path, torch.arange(10.0), [4])
    for path in tmp_path.glob("rank_*"):
        if CheckpointReader(tmp_path).read("w", "master", 0, 10) is not None:
            path.unlink()
            break
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path).read("w", "master", 0, 10)


def committed(folder, values=(1.0, 2.0)):
    folder.mkdir(parents=True)
    write(folder, torch.tensor(values), [1])
    (folder / STATE).write_text("{}")
    (folder / CONFIG).write_text("{}")
    files = {path.name: checksum(path) for path in folder.iterdir()}
    (folder / COMMIT).write_text(json.dumps({"files": files}))
    return folder


def test_a_flipped_byte_a_missing_file_and_a_missing_commit_are_named(tmp_path):
    whole = committed(tmp_path / "step_00000001")
    assert damage(whole) is None
    flipped = committed(tmp_path / "step_00000002")
    path = flipped / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its bytes changed" in damage(flipped)
    shorter = committed(tmp_path / "step_00000003")
    (shorter / "rank_00000.safetensors").unlink()
    assert "rank_00000.safetensors" in damage(shorter)
    unfinished = committed(tmp_path / "step_00000004")
    (unfinished / COMMIT).unlink()
    assert "never finished" in damage(unfinished)
    found = newest_whole(tmp_path)
    assert found.folder == whole
    assert len(found.passed_over) == 3


def test_starting_anew_where_all_are_damaged_is_refused_but_not_where_none_was_finished(tmp_path):
    unfinished = committed(tmp_path / "step_00000001")
    (unfinished / COMMIT).unlink()
    assert newest_whole(tmp_path).folder is None
    (committed(tmp_path / "step_00000002") / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        newest_whole(tmp_path)


def test_every_flipped_bit_of_commit_is_noticed(tmp_path):
    folder = committed(tmp_path / "step_00000001")
    whole = (folder / COMMIT).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / COMMIT).write_bytes(flipped)
        assert damage(folder) is not None, flipped
    (folder / COMMIT).write_bytes(whole)
    assert damage(folder) is None


def test_a_file_that_commit_does_not_promise_is_damage(tmp_path):
    folder = committed(tmp_path / "step_00000001")
    stray = folder / "rank_00002.safetensors"
    stray.write_bytes((folder / "rank_00001.safetensors").read_bytes())
    assert damage(folder) == f"{stray.name} is not in {COMMIT}"
    stray.unlink()
    promised = json.loads((folder / COMMIT).read_text())["files"]
    del promised[STATE]
    (folder / COMMIT).write_text(json.dumps({"files": promised}))
    assert damage(folder) == f"{STATE} is not in {COMMIT}"


def test_a_folder_whose_writing_was_cut_off_is_passed_over_by_name(tmp_path):
    whole = committed(tmp_path / "step_00000001")
    cut_off = committed(tmp_path / "step_00000002.tmp")
    found = newest_whole(tmp_path)
    assert found.folder == whole
    assert found.passed_over == (f"{cut_off}: its writing was cut off",)


def test_checkpoint_list_names_a_damaged_commit(tmp_path):
    folder = committed(tmp_path / "checkpoints" / "step_00000001")
    (folder / COMMIT).write_text('{"files": {"state.json": {"bites": 1}}}')
    (line,) = describe(tmp_path, is_deep=False)
    assert line == f"{folder.name}  not whole: {COMMIT} is unreadable"
