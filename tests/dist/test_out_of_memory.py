"""Memory that runs out is one line: what took it, and what to change."""

import pytest
from dist.watch_programs import with_little_memory
from helpers import forked
from helpers.command import train_arguments

from kandinsky_dist.status.collect import collect

pytestmark = pytest.mark.dist

ROOM_BYTES = 600 * 2**20


def test_an_allocation_that_fails_is_explained_with_the_remedy(tiny_models, small_corpus, tmp_path):
    """A real one: the system grants the process no more than a little above what it has when it begins."""
    words = train_arguments(
        "decoder", "data.resolution=512", "data.global_batch_size=64", "data.micro_batch_size=64",
        "optim.ema_decay=0.9", models=tiny_models, corpus=small_corpus, run_dir=tmp_path, strategy="ddp",
    )  # fmt: skip
    done = forked.call(with_little_memory, words, ROOM_BYTES)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert line.startswith("out of memory on rank 0 with data.micro_batch_size=64: peak ")
    for part in (
        "weights 0.",
        "frozen encoders 0.",
        "optimizer 0.",
        "averages 0.",
        "activations and the rest",
    ):
        assert part in line
    assert line.endswith(
        "; try, in this order: data.micro_batch_size=32 (the global batch stays 64), "
        "parallel.gradient_checkpointing=true, parallel.strategy=fsdp2 or zero2, more GPUs"
    )
    assert collect(tmp_path).state == "failed"
    assert collect(tmp_path).detail == f"{line} (exit code 1)"


def test_with_room_the_same_command_trains(tiny_models, small_corpus, tmp_path):
    words = train_arguments(
        "decoder", "run.max_steps=1", models=tiny_models, corpus=small_corpus, run_dir=tmp_path,
        strategy="ddp",
    )  # fmt: skip
    done = forked.call(with_little_memory, words, 8 * 2**30)
    assert done.returncode == 0, done.stderr
