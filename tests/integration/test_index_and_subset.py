"""data index and data subset as commands, and training on what they make."""

import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.command import keys
from helpers.forked import command, train
from helpers.lines import one_line
from helpers.servers import http_server

pytestmark = pytest.mark.integration

DATA, CONFIGURATION = 65, 78


@pytest.fixture
def bare(small_corpus, tmp_path) -> Path:
    """The training tars alone, in nested folders."""
    for number, tar in enumerate(sorted((small_corpus / "train").glob("*.tar"))):
        folder = tmp_path / "corpus" / "train" / f"part-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tar, folder)
    return tmp_path / "corpus"


def said(*words: object) -> str:
    """What a command that succeeds prints."""
    done = command(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_index_elsewhere_and_a_part_of_it_are_trained_on(tiny_models, bare, tmp_path):
    index = tmp_path / "index"
    for _ in range(2):
        found = said("data", "index", bare / "train", "--out", index, "--checksums", "--num-processes", "1")
        assert re.fullmatch(r"96 samples in 3 shards, fingerprint [0-9a-f]{16}\n", found)
    assert not list(bare.rglob("*.idx"))
    assert "64 samples in 2 of 3 shards" in said("data", "subset", index, tmp_path / "part", "--limit", "64")
    assert "32 samples in 1 of 3" in said(
        "data", "subset", tmp_path / "part", tmp_path / "less", "--limit", "32"
    )
    places = {"models": tiny_models, "corpus": bare, "run_dir": tmp_path / "run"}
    done = train("prior", f"data.shards={tmp_path / 'less'}", "run.max_steps=4", "data.audit=true", **places)
    assert done.returncode == 0, done.stderr
    seen = [key for step in keys(tmp_path / "run").values() for key in step]
    assert len(seen) == len(set(seen)) == 32  # an epoch: each of the 32 once
    line = one_line(
        train("prior", f"data.shards={tmp_path / 'part'}", "run.max_steps=5", "data.audit=true", **places),
        CONFIGURATION,
    )
    assert line.startswith("data.shards is corpus "), line


def test_damaged_shards(bare):
    shards = bare / "train"
    damaged = shards / "part-1" / "train-00001.tar"
    os.truncate(damaged, 1000)
    line = one_line(command("data", "index", shards), DATA)
    assert line.startswith(f"1 of 3 shards are damaged: {damaged} is cut short: 1000 bytes"), line
    assert line.endswith("copy it again; --skip-damaged leaves damaged shards out"), line
    assert len(list(shards.rglob("*.idx"))) == 2
    done = command("data", "index", shards, "--skip-damaged")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64 samples in 2 shards"), done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert "1 of 3 shards are damaged and left out: train-00001.tar" in done.stderr


def test_shards_on_a_server_are_indexed_here_and_trained_on(tiny_models, bare, tmp_path):
    with http_server(bare / "train") as server:
        pattern = f"{server.url}/part-0/train-{{00000..00009}}.tar"
        line = one_line(command("data", "index", pattern), DATA)
        assert line == f"shards={pattern} lie on a server: give a folder for the index with --out FOLDER"
        done = command("data", "index", pattern, "--out", tmp_path / "index")
        assert done.stdout.startswith("64 samples in 2 shards"), done
        assert "8 of 10 numbers have no shard" in done.stderr
        places = {"models": tiny_models, "corpus": bare, "run_dir": tmp_path / "run"}
        # Of samples of a kilobyte the default would plan a quarter of a million in advance.
        settings = ("run.max_steps=2", "data.read_ahead_mib=1")
        done = train("prior", f"data.shards={tmp_path / 'index'}", *settings, **places)
        assert done.returncode == 0, done.stderr
        line = one_line(train("prior", f"data.shards={pattern}", **places), DATA)
        assert line.endswith(f"data index '{pattern}' --out FOLDER, and give FOLDER as data.shards"), line


def test_conditions_that_cannot_be_meant(small_corpus, tmp_path):
    for words, expected in (
        ((), "a subset needs at least one condition, such as --min-side or --limit"),
        (("--limit", "0"), "limit=0 must be above 0"),
        (("--caption-matches", "("), "caption_matches='(' is no regular expression: *"),
    ):
        line = one_line(
            command("data", "subset", small_corpus / "train", tmp_path / "out", *words), CONFIGURATION
        )
        assert line.startswith(expected.rstrip("*")), line
    line = one_line(
        command("data", "subset", small_corpus / "train", tmp_path / "out", "--min-side", "9999"), DATA
    )
    assert line == f"shards={small_corpus / 'train'}: none of 96 samples fits; relax the conditions"
    assert not (tmp_path / "out").exists()
