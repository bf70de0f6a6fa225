"""`bench train` and `bench scaling` measure real trainings and leave record, page and picture."""

import json
from pathlib import Path

import pytest
from helpers import command as fresh
from helpers import forked
from helpers.forked import command

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.ladder import BASELINE
from kandinsky_dist.bench.parts import PARTS

pytestmark = pytest.mark.integration
SHORT = ("--size", "tiny", "--warmup", 1, "--steps", 2, "--repeats", 1)


def inputs(models: Path, corpus: Path) -> tuple[object, ...]:
    return ("--models", models, "--shards", corpus / "train")


def check(out: Path, name: str, stdout: str) -> list[dict]:
    """The rows, after a look at what every record must have."""
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    record = json.loads((out / f"{name}.json").read_text())
    assert {"torch", "diffusers", "accelerate"} <= record["versions"].keys()
    assert record["command"].startswith(f"kandinsky-dist bench {name} OUT --size tiny ")
    assert str(out.parent) not in (out / f"{name}.json").read_text(), "no path of this machine"
    for row in record["rows"]:
        assert row["note"] == ""
        assert len(row["step_seconds"]) == len(row["baseline_seconds"]) == 1
        (seconds,) = row["step_seconds"]
        assert row["samples_per_second"] == pytest.approx(row["global_batch_size"] / seconds)
        assert set(row["parts"]) == set(PARTS)
        # Clocks around parts that follow one another: never more than the whole, and most of it.
        assert 0 < sum(row["parts"].values()) <= 1.001 * seconds
        assert all(row["parts"][part] > 0 for part in ("encoders", "forward", "backward", "optimizer"))
        assert row["gflop_per_sample"] > 0
        assert row["peak_memory_gib"] > 0
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / f"{name}.md").read_text()
    assert to_markdown(out / f"{name}.json") == page
    assert stdout.endswith(page)
    return record["rows"]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_incumbents_way_does_the_same_work(stage, tiny_models, small_corpus, tmp_path):
    """Two micro-batches of the same samples with the same noise and weights: the same loss."""
    done = command(
        "bench", "train", tmp_path / "out", *SHORT, *inputs(tiny_models, small_corpus), "--stage", stage,
        "--vary", "data.num_workers", 0, "--data.micro_batch_size", 4, "--data.global_batch_size", 8,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs, ours = check(tmp_path / "out", "train", done.stdout)
    assert (theirs["case"], theirs["way"], ours["case"]) == (BASELINE, "incumbent", "num_workers=0")
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=5e-5)
    assert theirs["baseline_seconds"] == theirs["step_seconds"] == ours["baseline_seconds"]
    # Counted by both on their own; the prior here leaves out what is padding.
    counted = ours["gflop_per_sample"] / theirs["gflop_per_sample"]
    assert counted < 0.9 if stage == "prior" else counted == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(forked.command, id="forked"),
        pytest.param(fresh.command, id="fresh", marks=pytest.mark.campaign),
    ],
)
def test_several_ranks_and_what_they_wait_for(command, tiny_models, small_corpus, tmp_path):
    done = command(
        "bench", "train", tmp_path / "out", *SHORT, *inputs(tiny_models, small_corpus), "--stage", "prior",
        "--vary", "parallel.strategy", "ddp", "--world-size", 2, "--data.micro_batch_size", 2,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs, ours = check(tmp_path / "out", "train", done.stdout)
    assert [row["world_size"] for row in (theirs, ours)] == [2, 2]
    assert [row["global_batch_size"] for row in (theirs, ours)] == [4, 4]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=5e-5)
    assert len(ours["reduced_seconds"]) == len(ours["silent_seconds"]) == 1
    assert "silent_seconds" not in theirs
    assert "| communication |" in (tmp_path / "out" / "train.md").read_text()


def test_scaling_over_ranks(tiny_models, small_corpus, tmp_path):
    done = command(
        "bench", "scaling", tmp_path / "out", *SHORT, *inputs(tiny_models, small_corpus), "--stage", "prior",
        "--mode", "strong", "--ranks", 2, 1, "--data.micro_batch_size", 4,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = check(tmp_path / "out", "scaling", done.stdout)
    assert [(row["world_size"], row["global_batch_size"], row["mode"]) for row in rows] == [
        (1, 8, "strong"),
        (2, 8, "strong"),
    ]
    assert rows[1]["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
    assert "silent_seconds" in rows[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--repeats", 0), "--steps and --repeats must be 1 or more, --warmup and --alive 0 or more\n"),
        (("--model.variant", "lora"), "model.variant=lora is nothing that the incumbent's way can follow"),
        (("--vary", "parallel.strategy", "ddq"), "parallel.strategy=ddq is not one of"),
        (("--models", "/nowhere"), "--models /nowhere has no folder prior: kandinsky-dist models init makes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    words, message, tiny_models, small_corpus, tmp_path
):
    done = command(
        "bench", "train", tmp_path / "out", "--size", "tiny", *inputs(tiny_models, small_corpus), *words
    )
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    assert done.stderr.startswith(message)
