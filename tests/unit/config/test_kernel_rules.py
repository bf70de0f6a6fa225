"""Rules about compilation and profiles."""

import pytest

from kandinsky_dist.config import resolve
from kandinsky_dist.config.loader import Layer, load
from kandinsky_dist.config.stretches import stretches
from kandinsky_dist.errors import ConfigError


def problems(world_size=2, **settings):
    values = {"data.shards": "corpus", **{key.replace("__", "."): value for key, value in settings.items()}}
    return list(resolve.problems(load("prior", None, [Layer("test", values)]), world_size=world_size))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"parallel__compile": True, "parallel__strategy": "zero3"},
            "does not go with parallel.strategy=zero3",
        ),
        ({"parallel__compile": True, "parallel__attention": "xformers"}, "with parallel.attention=xformers"),
        ({"parallel__compile_cache": "/c"}, "parallel.compile_cache=/c needs parallel.compile=true"),
        ({"parallel__channels_last": True}, "applies to the decoder only"),
        ({"telemetry__profile": "5:3"}, "telemetry.profile has '5:3'"),
        ({"telemetry__profile": "0"}, "telemetry.profile has '0'"),
        ({"telemetry__profile": "3", "telemetry__profile_ranks": "2"}, "ranks go from 0 to 1"),
        ({"telemetry__profile_ranks": "1"}, "needs telemetry.profile"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, words):
    assert any(words in problem and "\n" not in problem for problem in problems(**settings)), problems(
        **settings
    )


def test_what_can_be_is_not_refused():
    for strategy in ("ddp", "fsdp2", "zero0", "zero1", "zero2"):
        found = problems(parallel__compile=True, parallel__compile_cache="/c", parallel__strategy=strategy)
        assert not found, (strategy, found)
    assert not problems(telemetry__profile="[2,4:5]", telemetry__profile_ranks="[0,1]")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), []),
        (("20", "24"), [range(20, 21), range(24, 25)]),
        (("20:24",), [range(20, 25)]),
        (("7", "5:6", "1"), [range(1, 2), range(5, 8)]),
        (("3:9", "4:5"), [range(3, 10)]),
    ],
)
def test_stretches_are_in_order_and_as_long_as_they_can_be(parts, expected):
    assert stretches(parts) == expected


@pytest.mark.parametrize("part", ["", "x", "3:", ":3", "1:2:3", "-1", "2.5"])
def test_what_is_no_stretch_is_refused(part):
    with pytest.raises(ConfigError, match="first:last"):
        stretches((part,))


@pytest.mark.parametrize(
    ("text", "expected"), [("20:24", ("20:24",)), ("[20:24, 30]", ("20:24", "30")), ("[7]", ("7",))]
)
def test_a_file_may_say_a_stretch_without_quotes(text, expected, tmp_path):
    (tmp_path / "run.yaml").write_text(f"telemetry:\n  profile: {text}\n")
    assert load("prior", str(tmp_path / "run.yaml"), []).config.telemetry.profile == expected
