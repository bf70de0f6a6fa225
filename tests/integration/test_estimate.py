"""`estimate` from the command line: tables, files, refusals, and records in place of assumptions."""

import json

import pytest
from helpers.forked import command
from helpers.shapes import write_shapes

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.record import Record
from kandinsky_dist.models.architectures import architecture

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), architecture("tiny"))


def estimate(shapes, *words):
    places = ("--model.prior", shapes / "prior", "--model.decoder", shapes / "decoder")
    batch = ("--data.global_batch_size", 1024, "--data.micro_batch_size", 4)
    return command("estimate", "prior", *places, *batch, *words, timeout=600)


def test_tables_and_files_without_corpus_weights_or_gpu(shapes, tmp_path):
    done = estimate(shapes, "--gpus", 8, 64, "--parallel.strategy", "zero2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "estimate.json",
        "estimate.md",
        "estimate.png",
    ]
    record = Record.load(tmp_path / "out" / "estimate.json")
    page = (tmp_path / "out" / "estimate.md").read_text()
    assert to_markdown(tmp_path / "out" / "estimate.json") == page
    assert "the shapes of its folder" in " ".join(done.stdout.split())
    assert all(line in page for line in done.stdout.splitlines() if line.startswith("|"))
    forecasts = [row for row in record.rows if row["kind"] == "forecast"]
    assert [(row["num_gpus"], row["strategy"], row["num_micro"]) for row in forecasts] == [
        (8, "zero2", 32),
        (64, "zero2", 4),
    ]
    strategies = {row["strategy"] for row in record.rows if row["kind"] == "candidate"}
    assert strategies == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    curve = [row for row in record.rows if row["kind"] == "curve"]
    assert max(row["num_gpus"] for row in curve) == 1024
    assert {row["scaling"] for row in curve} == {"grown", "fixed"}
    assert (tmp_path / "out" / "estimate.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_refused_with_what_does(shapes):
    batch = ("--data.global_batch_size", 2**20, "--data.micro_batch_size", 2**17)
    done = estimate(shapes, *batch, "--alone")
    assert done.returncode == 78
    assert "| no |" in " ".join(done.stdout.split())
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("data.micro_batch_size=131072 needs "), done.stderr
    assert "GiB under ddp on 8 GPUs, of which each leaves 71.6 GiB: the largest that fits is " in line
    assert 1 < int(line.rsplit(" ", 1)[1]) < 2**17


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", 6], "data.global_batch_size=1024 must be a multiple of micro_batch_size x world_size"),
        (["--gpus", 0], "--gpus and --gpus-per-node must be 1 or more"),
        (["--gpus", 16, "--gpus-per-node", 5], "--gpus 16 does not fill nodes of --gpus-per-node 5"),
        (["--text-tokens", 99], "--text-tokens 99 must be 1 to 77"),
        (["--mfu", 2], "--mfu must be in (0, 1]"),
        (["--mfu", 0.5, "--record", "x.json"], "--mfu and --fixed-ms do nothing with --record"),
        (["--gpu", "v100"], "invalid choice: 'v100'"),
    ],
)
def test_a_wrong_question(shapes, words, line):
    done = estimate(shapes, *words)
    assert done.returncode == 78, done.stdout
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_records_take_the_place_of_assumptions(shapes, tmp_path):
    train = {
        "stage": "prior", "way": "ours", "world_size": 1, "micro_batch_size": 4, "global_batch_size": 8,
        "step_seconds": [0.5], "settings": {},
    }  # fmt: skip
    Record.now("train", device="GPU", command="", setting={}, rows=[train]).save(tmp_path / "train.json")
    rows = [
        {"kind": "collective", "collective": name, "num_bytes": size, "seconds": [size * 1e-9]}
        for name in ("all-reduce", "all-gather", "reduce-scatter")
        for size in (4096, 2**24)
    ]
    Record.now("comm", device="GPU", command="", setting={"world_size": 2}, rows=rows).save(
        tmp_path / "comm.json"
    )
    words = (
        "--record",
        tmp_path / "train.json",
        "--comm",
        tmp_path / "comm.json",
        "--out",
        tmp_path,
        "--alone",
    )
    done = estimate(shapes, *words)
    assert done.returncode == 0, done.stderr
    assert "Computing: as measured in the record" in " ".join(done.stdout.split())
    assert "Collectives: as measured in the record" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "estimate.json").read_text())["rows"]
    (forecast,) = [row for row in found if row["kind"] == "forecast"]
    assert forecast["compute_seconds"] == pytest.approx(32 * 0.25)
    assert forecast["update_seconds"] == 0.0
