"""A checkpoint written beside training is the one that training would have waited for."""

import re
from typing import Any

import pytest
from dist.checkpoint_programs import background_facts
from helpers.command import DEFAULTS
from helpers.forked import run_on_ranks

from kandinsky_dist.checkpoint.layout import CheckpointReader, damage

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def saved(request, tiny_models, small_corpus, tmp_path_factory) -> tuple[Any, Any]:
    """The folder of one start of two ranks, and what each found."""
    folder = tmp_path_factory.mktemp("background")
    settings = {
        **DEFAULTS,
        "model.prior": str(tiny_models / "prior"),
        "model.decoder": str(tiny_models / "decoder"),
        "data.shards": str(small_corpus / "train"),
        "run.dir": str(folder / "run"),
        "run.max_steps": 1,
        "parallel.strategy": request.param,
    }
    return folder, run_on_ranks(background_facts, 2, "prior", settings, folder)


def test_the_files_are_those_of_a_save_that_training_waits_for(saved):
    _, facts = saved
    assert [rank["same"] for rank in facts] == [[True] * 3] * 2


def test_every_kind_is_read_back(saved):
    folder, _ = saved
    reader = CheckpointReader(folder / "beside" / "checkpoints" / "step_00000007")
    for name, numel in reader.numels.items():
        master, ema = (reader.read(name, kind, 0, numel) for kind in ("master", "ema"))
        assert ema.equal(master * 0.5)


def test_where_memory_is_short_training_waits_and_says_so(saved):
    folder, facts = saved
    assert [rank["short of memory"]["is finished"] for rank in facts] == [True] * 2
    (line,) = facts[0]["short of memory"]["said"].splitlines()
    assert re.fullmatch(
        r"kandinsky-dist: a checkpoint's copy takes 0\.0 GiB of \S+'s memory, of which 0\.0 GiB are free: "
        "training waits while it is written",
        line,
    )
    for path in (folder / "short" / "checkpoints").iterdir():
        assert damage(path) is None


def test_what_the_main_threads_ask_meanwhile_gets_its_own_answer(saved):
    _, facts = saved
    for rank in facts:
        assert len(rank["answers"]) > 1
        assert all(rank["answers"])


def test_one_ranks_failure_is_raised_on_all_ranks(saved):
    folder, facts = saved
    for rank in facts:
        found = rank["failures"]
        for place in ("at the end", "at the next save"):
            assert found[place].startswith("checkpoint not written: rank 1: "), found
            assert "File too large" in found[place], found
            assert found[place].endswith("; the older checkpoints are untouched"), found
        assert found["once"] == "nothing"
        assert found["stop is made"] == "True"
        assert found["copy"].startswith("checkpoint not written: rank 1: NotImplementedError: "), found
        # Nothing of the failed ones, all of those before.
        assert rank["left"] == [f"step_{step:08d}" for step in (7, 8, 9, 10)]
    for path in (folder / "beside" / "checkpoints").iterdir():
        assert damage(path) is None
    assert (folder / "beside" / "checkpoints" / "step_00000099").is_dir()


def test_no_thread_is_left(saved):
    _, facts = saved
    for rank in facts:
        assert rank["threads_after_run"] == rank["threads"] == []
