"""float8 where it cannot work is one line with the remedy."""

import importlib.util

import pytest

from kandinsky_dist.config.loader import command_line_layer, load
from kandinsky_dist.config.resolve import problems


def lines(stage: str, *words: str) -> list[str]:
    layer = command_line_layer(["--data.shards=x", *(f"--{word}" for word in words)])
    return list(problems(load(stage, None, [layer]), world_size=1))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("parallel.strategy=zero2",),
            "parallel.float8=True needs parallel.strategy=ddp or fsdp2, it is zero2",
        ),
        (("parallel.precision=fp16",), "parallel.float8=True needs parallel.precision=bf16, it is fp16"),
        (("model.variant=lora",), "parallel.float8=True needs model.variant=full, it is lora"),
    ],
)
def test_float8_beside_what_it_does_not_go_with(words, line):
    assert line in lines("prior", "parallel.float8=true", *words)


def test_float8_is_the_priors():
    (found,) = (line for line in lines("decoder", "parallel.float8=true") if "prior only" in line)
    assert found.startswith("parallel.float8=True (command line) applies to the prior only")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_float8_names_the_package_that_it_needs():
    (found,) = lines("prior", "parallel.float8=true")
    assert found == "parallel.float8=true needs the package torchao: pip install 'kandinsky-dist[float8]'"
