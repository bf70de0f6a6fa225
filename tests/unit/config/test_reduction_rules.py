"""A setting of gradient reduction that the strategy does not have is one line with the remedy."""

import pytest

from kandinsky_dist.config.loader import command_line_layer, load
from kandinsky_dist.config.resolve import problems


def lines(*words: str) -> list[str]:
    arguments = [f"--parallel.{word}" for word in words]
    resolved = load("prior", None, [command_line_layer(["--data.shards=x", *arguments])])
    return list(problems(resolved, world_size=1))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("static_graph=true", "strategy=fsdp2"), "parallel.static_graph=True needs parallel.strategy=ddp"),
        (
            ("first_bucket_mib=1", "strategy=fsdp2"),
            "parallel.first_bucket_mib=1.0 needs parallel.strategy=ddp",
        ),
        (
            ("gradient_compression=bf16", "strategy=fsdp2"),
            "parallel.gradient_compression=bf16 needs parallel.strategy=ddp, it is fsdp2",
        ),
        (("overlap=false", "strategy=fsdp2"), "fsdp2 always reduces beside backward"),
        (("overlap=false", "bucket_mib=5"), "parallel.bucket_mib=5.0 does nothing with overlap=False"),
        (
            ("overlap=false", "first_bucket_mib=1"),
            "parallel.first_bucket_mib=1.0 does nothing with overlap=Fal",
        ),
        (("first_bucket_mib=30",), "parallel.first_bucket_mib=30.0 must not be above bucket_mib=25.0"),
        (("first_bucket_mib=-1",), "parallel.first_bucket_mib=-1.0 must be 0 or more"),
    ],
)
def test_what_a_strategy_does_not_have_is_one_line(words, line):
    (found,) = lines(*words)
    assert line in found
    assert "\n" not in found


def test_zero0_does_not_overlap():
    assert any(
        "zero0, which reduces after backward" in line for line in lines("overlap=true", "strategy=zero0")
    )
    assert not any("overlap" in line for line in lines("strategy=zero0"))


@pytest.mark.parametrize(
    "words",
    [
        ("first_bucket_mib=1", "bucket_mib=30", "static_graph=true", "gradient_compression=fp16"),
        ("overlap=false",),
        ("overlap=false", "strategy=zero2", "bucket_mib=5"),
    ],
)
def test_what_a_strategy_has_is_accepted(words):
    assert not [line for line in lines(*words) if "parallel" in line and "package" not in line]
