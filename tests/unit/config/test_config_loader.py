import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import yaml
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.config.loader import Layer, command_line_layer, load, recipe_names
from kandinsky_dist.config.resolve import problems
from kandinsky_dist.config.schema import KEYS, SECTIONS, STAGES, Config
from kandinsky_dist.errors import ConfigError


def resolve(*arguments: str, stage: str = "prior", source: str | None = None):
    return load(stage, source, [command_line_layer(arguments)])


def message_of(*arguments: str, stage: str = "prior", source: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(*arguments, stage=stage, source=source)
    message = str(caught.value)
    assert "\n" not in message, message
    assert caught.value.exit_code == 78
    return message


def test_defaults_are_those_of_the_schema_and_say_so():
    resolved = load("decoder", None, [])
    assert resolved.config == Config(stage="decoder")
    assert set(resolved.origins) == set(KEYS)
    assert set(resolved.origins.values()) == {"default"}


def test_configuration_is_frozen():
    config = load("prior", None, []).config
    with pytest.raises(FrozenInstanceError):
        config.data.num_workers = 3


def test_later_layers_win_and_every_value_names_its_origin(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {num_workers: 5, global_batch_size: 32, micro_batch_size: 4}\n")
    resolved = load(
        "prior",
        str(path),
        [
            Layer("accelerate environment", {"data.global_batch_size": 16, "parallel.precision": "bf16"}),
            command_line_layer(["--data.micro_batch_size", "2"]),
        ],
    )
    data = resolved.config.data
    assert (data.num_workers, data.global_batch_size, data.micro_batch_size) == (5, 16, 2)
    assert resolved.origins["data.num_workers"] == str(path)
    assert resolved.origins["data.global_batch_size"] == "accelerate environment"
    assert resolved.origins["parallel.precision"] == "accelerate environment"
    assert resolved.origins["data.micro_batch_size"] == "command line"
    assert resolved.origins["run.seed"] == "default"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.learning_rat", "optim.learning_rate"),
        ("data.learning_rate", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("max_steps", "run.max_steps"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_one(wrong, right):
    message = message_of(f"--{wrong}", "1")
    assert message == f"unknown key {wrong} (command line); did you mean {right}?"


def test_unknown_key_like_no_other_gets_no_guess():
    assert message_of("--zzz.qqq", "1") == "unknown key zzz.qqq (command line)"


def test_unknown_section_in_a_file_is_refused_with_the_nearest_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: {learning_rate: 1}\n")
    assert message_of(source=str(path)) == f"unknown section optimizer ({path}); did you mean optim?"


def test_unknown_choice_is_refused_with_all_choices_and_the_nearest_one():
    message = message_of("--parallel.strategy", "zero9")
    assert message.startswith("parallel.strategy=zero9 is not one of ddp, ")
    assert message.rpartition("; ")[2].startswith("did you mean zero")
    assert message_of("--telemetry.report_to", "[tensorbord]").endswith("did you mean tensorboard?")


@pytest.mark.skipif("prior_tiny" not in recipe_names(), reason="the package brings no recipes yet")
def test_unknown_recipe_is_refused_with_the_nearest_one_and_all_of_them():
    message = message_of(source="prior_tny")
    assert message.startswith(
        "--config prior_tny: neither a .yaml file nor a recipe; did you mean prior_tiny?"
    )
    assert all(name in message for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_for_its_stage(name):
    stage = next(stage for stage in STAGES if stage in name)
    resolved = load(stage, name, [])
    assert f"recipe {name}" in resolved.origins.values()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.learning_rate", "1e-4", 1e-4),
        ("optim.learning_rate", "3", 3.0),
        ("run.max_steps", "10_000", 10_000),
        ("data.audit", "true", True),
        ("data.audit", "False", False),
        ("data.audit", "yes", True),
        ("data.audit", "0", False),
        ("objective.snr_gamma", "null", None),
        ("objective.snr_gamma", "none", None),
        ("objective.snr_gamma", "5", 5.0),
        ("data.shards", "a:b #c", "a:b #c"),
        ("run.resume", "never", "never"),
        ("run.allow_change", "[run.seed, data.shards]", ("run.seed", "data.shards")),
        ("run.allow_change", "run.seed,data.shards", ("run.seed", "data.shards")),
        ("run.allow_change", "[]", ()),
        ("telemetry.report_to", "tensorboard", ("tensorboard",)),
        ("optim.ema_decay", "0.9999", (0.9999,)),
        ("optim.ema_decay", "[0.999,0.9999]", (0.999, 0.9999)),
    ],
)
def test_command_line_words_become_the_declared_type(key, text, value):
    for arguments in (("--" + key, text), (f"--{key}={text}",)):
        found = resolve(*arguments).config.get(key)
        assert found == value
        assert type(found) is type(value)


def test_yaml_values_become_the_declared_type(tmp_path):
    path = tmp_path / "mine.yaml"
    # YAML 1.1 reads 1e-4 as text, for want of a dot.
    path.write_text(
        "optim: {learning_rate: 1e-4, weight_decay: 0, ema_decay: 0.999}\n"
        "data: {shards: null, audit: true, num_workers: 4.0}\n"
        "objective: {snr_gamma: 5}\n"
        "telemetry: {report_to: []}\n"
    )
    config = resolve(source=str(path)).config
    assert (config.optim.learning_rate, config.optim.weight_decay) == (1e-4, 0.0)
    assert type(config.optim.weight_decay) is float
    assert config.optim.ema_decay == (0.999,)
    assert (config.data.shards, config.data.audit, config.data.num_workers) == (None, True, 4)
    assert type(config.data.num_workers) is int
    assert config.objective.snr_gamma == 5.0
    assert config.telemetry.report_to == ()


@pytest.mark.parametrize(
    ("key", "text", "rule"),
    [
        ("run.max_steps", "1.5", "must be a whole number"),
        ("run.max_steps", "many", "must be a whole number"),
        ("run.max_steps", "true", "must be a whole number"),
        ("run.max_steps", "null", "must be a whole number"),
        ("optim.learning_rate", "fast", "must be a number"),
        ("data.audit", "maybe", "must be true or false"),
    ],
)
def test_value_of_the_wrong_type_is_refused_with_the_rule(key, text, rule):
    assert message_of(f"--{key}", text) == f"{key}={text} {rule}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {max_steps: true}", "run.max_steps=True must be a whole number"),
        ("run: {dir: [a, b]}", "run.dir=['a', 'b'] must be text"),
        ("run: {resume: no}", "run.resume=False must be text"),
        ("run: {allow_change: true}", "run.allow_change=True must be a list, e.g. [a, b]"),
        ("optim: {learning_rate: [1]}", "optim.learning_rate=[1] must be a number"),
        ("run: 3", "section run (FILE) must hold keys, holds 3"),
        ("[1, 2]", "--config FILE: must be sections of keys, is a list"),
    ],
)
def test_file_with_a_value_of_the_wrong_type_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message_of(source=str(path)) == message.replace("FILE", str(path))


def test_file_that_is_no_yaml_is_refused_in_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {dir: [\n")
    assert message_of(source=str(path)).startswith(f"--config {path}: not valid YAML: ")


def test_missing_file_and_missing_recipe_are_refused(tmp_path):
    assert message_of(source=str(tmp_path / "no.yaml")).endswith("no.yaml: No such file or directory")
    assert "neither a .yaml file nor a recipe" in message_of(source="no_such_thing_at_all")


def test_file_of_another_stage_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stage: decoder\nrun: {seed: 3}\n")
    assert message_of(source=str(path)) == f"--config {path} is for stage decoder, the command trains prior"
    assert resolve(stage="decoder", source=str(path)).config.run.seed == 3


@pytest.mark.parametrize("arguments", [["--data.audit"], ["--data.audit", "--run.seed", "3"]])
def test_bare_boolean_is_true(arguments):
    assert resolve(*arguments).config.data.audit is True


@pytest.mark.parametrize(
    "arguments", [["--run.dir"], ["--data.shards", "--run.seed", "3"], ["--run.allow_change"]]
)
def test_bare_key_that_is_no_boolean_is_refused(arguments):
    assert message_of(*arguments) == f"{arguments[0]} needs a value: --section.key value"


def test_negative_number_is_a_value_not_a_key():
    assert resolve("--run.seed", "-3").config.run.seed == -3


def test_word_without_a_key_is_refused():
    assert message_of("run.seed", "3").startswith("unexpected argument 'run.seed'")


def test_resolved_yaml_loads_back_and_shows_origins(tmp_path):
    resolved = resolve(
        "--optim.learning_rate", "1e-8", "--data.shards", "a b", "--data.audit", stage="decoder"
    )
    path = tmp_path / "config.yaml"
    path.write_text(resolved.to_yaml())
    again = load("decoder", str(path), [])
    assert again.config == resolved.config
    assert set(again.origins.values()) == {str(path)}
    lines = path.read_text().splitlines()
    assert "  learning_rate: 1.0e-08  # command line" in lines
    assert "  seed: 0  # default" in lines


# As a user may type them: words that YAML would take for something else, quotes, marks and line ends.
texts = st.one_of(
    st.sampled_from(
        ["null", "~", "1e-4", "yes", "# not a comment", "a: b", "{stage}", "...", "- x", "'", "a\nb", ""]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@given(
    learning_rate=st.floats(allow_nan=False),
    snr_gamma=st.none() | st.floats(allow_nan=False),
    num_workers=st.integers(),
    audit=st.booleans(),
    directory=texts,
    allow_change=st.lists(texts, max_size=3),
)
@examples(100)
def test_resolved_yaml_loads_back_whatever_the_values(
    tmp_path_factory, learning_rate, snr_gamma, num_workers, audit, directory, allow_change
):
    values = {
        "optim.learning_rate": learning_rate,
        "objective.snr_gamma": snr_gamma,
        "data.num_workers": num_workers,
        "data.audit": audit,
        "run.dir": directory,
        "run.allow_change": allow_change,
    }
    resolved = load("prior", None, [Layer("test", values)])
    tree = yaml.safe_load(resolved.to_yaml())
    assert tree.pop("stage") == "prior"
    assert list(tree) == list(SECTIONS)
    flat = {f"{section}.{name}": value for section, keys in tree.items() for name, value in keys.items()}
    assert load("prior", None, [Layer("test", flat)]).config == resolved.config


def test_configuration_is_read_without_torch():
    code = (
        "import sys, kandinsky_dist.config.loader as loader; loader.load('prior', None, []); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guard.max_nonfinite_steps=-1"], "guard.max_nonfinite_steps=-1 must be 0 or more"),
        (["--guard.spike_threshold=-6"], "guard.spike_threshold=-6.0 must be 0 or more"),
        (["--guard.spike_threshold=6", "--guard.spike_window_steps=9"], "must be 10 or more"),
        (["--guard.spike_threshold=6", "--guard.spike_patience_steps=0"], "must be above 0"),
        (["--guard.max_rollbacks=-1"], "guard.max_rollbacks=-1 must be 0 or more"),
        (
            ["--guard.spike_window_steps=50"],
            "guard.spike_window_steps=50 needs guard.spike_threshold above 0",
        ),
    ],
)
def test_rules_of_the_guard(arguments, words):
    broken = list(problems(resolve("--data.shards=x", *arguments), world_size=1))
    assert len(broken) == 1
    assert words in broken[0]
