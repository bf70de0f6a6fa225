"""What a run on encoder outputs, or their making, cannot have is one line with the remedy."""

import pytest

from kandinsky_dist.config.loader import command_line_layer, load
from kandinsky_dist.config.resolve import check_precompute, problems
from kandinsky_dist.errors import ConfigError

NEEDS_IMAGES = [
    ("decoder", "data.random_crop=true", "data.random_crop=True needs data.source=raw"),
    ("prior", "data.captions=[txt,json.tags]", "data.captions=['txt', 'json.tags'] chooses among captions"),
]


def resolved(stage: str, *words: str):
    return load(stage, None, [command_line_layer(["--data.shards=x", *(f"--{word}" for word in words)])])


@pytest.mark.parametrize(("stage", "setting", "line"), NEEDS_IMAGES)
def test_what_needs_the_images_is_one_line(stage, setting, line):
    (found,) = problems(resolved(stage, setting, "data.source=cached"), world_size=1)
    assert line in found
    assert "\n" not in found
    assert list(problems(resolved(stage, setting), world_size=1)) == []


def test_lengths_are_not_known_of_captions_that_are_not_read_yet():
    (found,) = problems(resolved("prior", "data.group_by_length=true"), world_size=1)
    assert found.startswith("data.group_by_length=True needs data.source=cached")
    assert not list(
        problems(resolved("prior", "data.group_by_length=false", "data.source=cached"), world_size=1)
    )


def test_a_plain_run_on_encoder_outputs_is_fine():
    settings = ("data.source=cached", "data.aspect_buckets=true", "data.horizontal_flip=0.5")
    assert list(problems(resolved("decoder", *settings), world_size=1)) == []


@pytest.mark.parametrize(
    ("stage", "setting", "line"),
    [
        *NEEDS_IMAGES,
        ("prior", "data.source=cached", "data.source=cached: precompute reads images and captions"),
        ("prior", "data.mixture=[x=1,y=2]", "precompute one corpus of it at a time"),
    ],
)
def test_what_cannot_be_encoded_in_advance_is_one_line(stage, setting, line):
    check_precompute(resolved(stage).config)
    with pytest.raises(ConfigError) as caught:
        check_precompute(resolved(stage, setting).config)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
