"""From recipe, YAML file and command line to one frozen Config that knows where each value came from."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from kandinsky_dist.config.schema import KEYS, SECTIONS, Config, Stage
from kandinsky_dist.errors import ConfigError

DEFAULT_ORIGIN = "default"


@dataclass(frozen=True)
class Layer:
    """Settings from one place; later layers win over earlier ones."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each dotted key, the origin of its value."""

    config: Config
    origins: Mapping[str, str]

    def to_yaml(self) -> str:
        """The configuration as YAML that loads back, each line with its origin as a comment."""
        lines = [f"stage: {self.config.stage}"]
        for section, cls in SECTIONS.items():
            lines.append(f"{section}:")
            for name in cls.__dataclass_fields__:
                key = f"{section}.{name}"
                value = self.config.get(key)
                text = yaml.safe_dump(
                    list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10**6
                )
                lines.append(f"  {name}: {text.removesuffix('...' + chr(10)).strip()}  # {self.origins[key]}")
        return "\n".join(lines) + "\n"


def load(stage: Stage, source: str | None, layers: Sequence[Layer]) -> Resolved:
    """Resolves a run's configuration.

    Args:
        stage: what the command trains.
        source: recipe name or path of a YAML file; None takes the defaults.
        layers: settings that win over `source`, in rising order.

    Raises:
        ConfigError: unknown key or recipe, a value of the wrong type, a file of another stage.
    """
    file_layers = [] if source is None else [_read(stage, source)]
    values: dict[str, Any] = {key: item.default for key, item in KEYS.items()}
    origins = dict.fromkeys(KEYS, DEFAULT_ORIGIN)
    for layer in (*file_layers, *layers):
        for key, raw in layer.values.items():
            if key not in KEYS:
                raise ConfigError(f"unknown key {key} ({layer.origin}){_did_you_mean(key, KEYS)}")
            values[key] = _coerce(key, raw, _kind_of(key))
            origins[key] = layer.origin
    sections = {
        section: cls(**{name: values[f"{section}.{name}"] for name in cls.__dataclass_fields__})
        for section, cls in SECTIONS.items()
    }
    return Resolved(Config(stage=stage, **sections), origins)


def command_line_layer(arguments: Sequence[str]) -> Layer:
    """Turns `--section.key value`, `--section.key=value` and a bare boolean `--section.key` into a layer."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: settings are written --section.key value")
        key, has_value, text = word[2:].partition("=")
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif key in KEYS and _kind_of(key) is not bool:
                raise ConfigError(f"--{key} needs a value: --section.key value")
            else:
                text = "true"
        values[key] = text
    return Layer("command line", values)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("kandinsky_dist") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def _read(stage: Stage, source: str) -> Layer:
    path = Path(source)
    if source in recipe_names():
        origin = f"recipe {source}"
        text = (resources.files("kandinsky_dist") / "recipes" / f"{source}.yaml").read_text()
    elif path.suffix in (".yaml", ".yml"):
        origin = source
        try:
            text = path.read_text("utf-8-sig")
        except OSError as error:
            raise ConfigError(f"--config {source}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--config {source}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error
    else:
        raise ConfigError(
            f"--config {source}: neither a .yaml file nor a recipe{_did_you_mean(source, recipe_names())}; "
            f"recipes: {', '.join(recipe_names())}"
        )
    try:
        tree = yaml.load(text, _Loader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {source}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {source}: must be sections of keys, is a {type(tree).__name__}")
    found = tree.pop("stage", stage)
    if found != stage:
        raise ConfigError(f"--config {source} is for stage {found}, the command trains {stage}")
    values = {}
    for section, keys in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section} ({origin}){_did_you_mean(str(section), SECTIONS)}")
        if keys is None:
            continue  # all of its keys are commented out
        if not isinstance(keys, dict):
            raise ConfigError(f"section {section} ({origin}) must hold keys, holds {keys!r}")
        values.update({f"{section}.{name}": value for name, value in keys.items()})
    return Layer(origin, values)


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: one of the two would be silently ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _int_or_text(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """20:24 is a range of steps; YAML 1.1 would read a number to the base of 60."""
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _int_or_text)


def _kind_of(key: str) -> Any:
    section, _, name = key.partition(".")
    return typing.get_type_hints(SECTIONS[section])[name]


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section, or without one
        leaf = word.rpartition(".")[2]
        close = [name for name in names if name.rpartition(".")[2] == leaf][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _coerce(key: str, raw: Any, kind: Any) -> Any:
    """Brings a YAML value or a command-line word to the type that the schema declares."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None or (isinstance(raw, str) and raw.lower() in ("null", "none", "")):
            return None
        (kind,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
        return _coerce(key, raw, kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if raw not in choices:
            hint = _did_you_mean(str(raw), choices)
            raise ConfigError(f"{key}={raw} is not one of {', '.join(choices)}{hint}")
        return raw
    if origin is tuple:
        if isinstance(raw, str):
            raw = [part.strip() for part in raw.strip("[]").split(",") if part.strip()]
        if isinstance(raw, float):
            raw = [raw]
        if not isinstance(raw, (list, tuple)):
            raise ConfigError(f"{key}={raw!r} must be a list, e.g. [a, b]")
        return tuple(_coerce(key, part, typing.get_args(kind)[0]) for part in raw)
    try:
        return _PARSERS[kind](raw)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={raw} must be {_KIND_NAMES[kind]}") from None


def _parse_bool(raw: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[str(raw).lower()] if str(raw).lower() in words else _fail(raw)


def _parse_int(raw: Any) -> int:
    if isinstance(raw, bool) or (isinstance(raw, float) and not raw.is_integer()):
        _fail(raw)
    return int(raw.replace("_", "")) if isinstance(raw, str) else int(raw)


def _parse_float(raw: Any) -> float:
    if isinstance(raw, bool):
        _fail(raw)
    return float(raw)


def _parse_str(raw: Any) -> str:
    if isinstance(raw, (bool, dict, list)) or raw is None:  # bool: YAML reads a bare no, off or yes as one
        _fail(raw)
    return str(raw)


def _fail(raw: Any) -> Any:
    raise ValueError(raw)


_PARSERS = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: _parse_str}
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
