"""Pipeline folders: finding them, refusing what cannot be trusted, and reading one network's weights."""

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import COMPONENTS, PIPELINE_CLASSES
from kandinsky_dist.models.zero_init import outside_zero_init

Component = Literal["prior", "unet"]

CONFIG_FILES = {"scheduler": "scheduler_config.json", "image_processor": "preprocessor_config.json"}
WEIGHTLESS = ("scheduler", "image_processor", "tokenizer")
WEIGHTS_NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
STATISTICS = ("clip_mean", "clip_std")


def pipeline_folder(name_or_path: str, key: str, components: Sequence[str]) -> Path:
    """A local pipeline folder in which the named components are whole.

    Args:
        name_or_path: a diffusers pipeline folder, or a hub name, of which only what is needed is downloaded.
        key: the setting that named it, for messages: "model.prior".
        components: names as in model_index.json; together they say which pipeline it has to be.

    Raises:
        ConfigError: not found, another pipeline, a component missing, damaged or stored as a pickle.
    """
    problem = f"{key}={name_or_path}"
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(name_or_path, problem, components)
    stage = next(stage for stage, known in COMPONENTS.items() if set(components) <= set(known))
    index = _read_json(folder / "model_index.json", problem)
    found, expected = index.get("_class_name"), PIPELINE_CLASSES[stage]
    if found != expected:
        raise ConfigError(f"{problem} is a {found} (model_index.json); {key} needs a {expected}")
    for component in components:
        _check_component(folder / component, problem, COMPONENTS[stage][component][0])
    return folder


def _download(name: str, problem: str, components: Sequence[str]) -> Path:
    """The hub's snapshot of the components' configurations and unvaried safetensors; honours offline mode."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{problem} is not a folder: name a diffusers pipeline folder (kandinsky-dist models init makes "
            "some) or a hub name"
        )
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.safetensors", f"{component}/*.txt"]
    try:
        return Path(
            snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise ConfigError(
            f"{problem} is not a folder and cannot be loaded from the hub ({reason}); name a "
            "pipeline folder, or download it where there is a network"
        ) from error


def _check_component(folder: Path, problem: str, library: str) -> None:
    name = folder.name
    if not folder.is_dir():
        raise ConfigError(f"{problem} has no folder {name}: it is not a whole pipeline")
    if name == "tokenizer":
        return  # judged by load_tokenizer, against the text encoder
    _read_json(folder / CONFIG_FILES.get(name, "config.json"), problem)
    if name in WEIGHTLESS:
        return
    _tensor_shapes(folder, library, problem)


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{problem} has no {where}: it is not a diffusers pipeline folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{problem} has an unreadable {where}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{problem} has a {where} that is not an object")
    return content


def weight_files(folder: Path, library: str, problem: str) -> list[Path]:
    """A component's safetensors files: one, or those that its index names."""
    name = WEIGHTS_NAMES[library]
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = set(_read_json(index, problem).get("weight_map", {}).values())
        missing = sorted(file for file in names if not (folder / file).is_file())
        if missing or not names:
            raise ConfigError(
                f"{problem} lacks {folder.name}/{(missing or ['*.safetensors'])[0]} of {index.name}"
            )
        return sorted(folder / file for file in names)
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".ckpt", ".pth")
    )
    if pickles:
        raise ConfigError(
            f"{problem} has {folder.name} only as {pickles[0]}, a pickle, which is never read: convert it to "
            f"{single.name}"
        )
    raise ConfigError(f"{problem} has no {folder.name}/{single.name}")


def _tensor_shapes(folder: Path, library: str, problem: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the files' headers; a truncated file is found by its header."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, library, problem):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{problem} has a damaged {folder.name}/{path.name} ({error}): copy or download it again"
            ) from error
    return shapes


@dataclass(frozen=True)
class ModelSource:
    """A network to be trained: its structure and, apart from it, its weights."""

    folder: Path
    """Pipeline folder, as `pipeline_folder` returned it."""
    component: Component
    other_weights: Path | None = None
    """Folder whose weights take the place of the pipeline's, for a network of the same architecture."""

    @property
    def path(self) -> Path:
        """The component's own folder."""
        return self.folder / self.component

    @property
    def weights(self) -> Path:
        """The folder with its weights."""
        return self.other_weights or self.path

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the network."""
        return _read_json(self.path / "config.json", str(self.folder))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, from the files' headers."""
        return _tensor_shapes(self.weights, "diffusers", str(self.weights.parent))

    def build(self) -> nn.Module:
        """The structure alone, fp32 and in training mode; no weights are read.

        May be called under `deepspeed.zero.Init`, a meta device or FakeTensorMode.

        Raises:
            ConfigError: config.json has values of which no such network can be made.
        """
        try:
            module: nn.Module = self._class().from_config(self.config)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{self.path}/config.json does not describe a {self._class().__name__} "
                f"({next(iter(str(error).splitlines()), type(error).__name__)}): copy or download it again"
            ) from error
        return module.train()

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, mapped from the files: bytes are read when a tensor is copied.

        Raises:
            ConfigError: names or shapes are not those that the configuration builds.
        """
        from safetensors import safe_open

        self._check_shapes()
        tensors: dict[str, Tensor] = {}
        for path in weight_files(self.weights, "diffusers", str(self.weights.parent)):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensors[name] = file.get_tensor(name)
        return tensors

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of the architecture: equal for two folders whose networks have the same shape.

        Settings at the library's default are left out, so that an older file, which lacks the newer ones,
        is not another architecture.
        """
        content = [self.component, self._settings(self.config), sorted(self.shapes.items())]
        return hashlib.sha256(_as_json(content).encode()).hexdigest()

    def with_weights(self, name: str) -> "ModelSource":
        """The network with the weights of another folder.

        Args:
            name: folder that `save_pretrained` made of such a network, or one in which that lies under the
                name that it has in a pipeline.

        Raises:
            ConfigError: there is none, it is damaged or stored as a pickle, or of another architecture.
        """
        problem = f"model.weights={name}"
        folder = Path(name).expanduser()
        if (folder / self.component).is_dir():
            folder = folder / self.component
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{problem} has neither config.json nor {self.component}/config.json: name a folder that "
                f"save_pretrained made of a {self._class().__name__}"
            )
        theirs = _read_json(folder / "config.json", problem)
        found = ModelSource(self.folder, self.component, folder)
        mine = {"_class_name": self._class().__name__, **self._settings(self.config, is_known=True)}
        other = {"_class_name": theirs.get("_class_name"), **self._settings(theirs, is_known=True)}
        for key in sorted({*mine, *other}):
            if _as_json(mine.get(key)) != _as_json(other.get(key)):
                found_words, own_words = (side.get(key, "the default") for side in (other, mine))
                raise ConfigError(
                    f"{problem} is a network with {key}={found_words}, {self.folder} has {own_words}: "
                    "the two must be of one architecture"
                )
        found._check_shapes()
        return found

    def _settings(self, config: Mapping[str, Any], *, is_known: bool = False) -> dict[str, Any]:
        """What a configuration sets otherwise than the library; only what its class knows if `is_known`."""
        parameters = inspect.signature(self._class().__init__).parameters
        return {
            name: value
            for name, value in config.items()
            if not name.startswith("_")
            and (name in parameters or not is_known)
            and not (name in parameters and _as_json(parameters[name].default) == _as_json(value))
        }

    def _class(self) -> Any:
        import diffusers

        return diffusers.PriorTransformer if self.component == "prior" else diffusers.UNet2DConditionModel

    def _check_shapes(self) -> None:
        with outside_zero_init(), torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in self.build().state_dict().items()}
        if self.shapes == expected:
            return
        differing = {*self.shapes, *expected}
        name = min(name for name in differing if self.shapes.get(name) != expected.get(name))
        raise ConfigError(
            f"{self.weights} has {_shape_words(self.shapes, name)} in its weights and "
            f"{_shape_words(expected, name)} by its config.json: the two do not belong together"
        )


def _shape_words(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def freeze_statistics(module: nn.Module) -> None:
    """Takes clip_mean and clip_std out of training.

    diffusers registers them as parameters, but forward never uses them: DDP would wait for their gradients
    and weight decay would shrink them.
    """
    for name, parameter in module.named_parameters():
        if name in STATISTICS:
            parameter.requires_grad_(False)
