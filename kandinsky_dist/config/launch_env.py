"""Settings that `accelerate launch` hands down in environment variables. Never imports torch.

Accelerate is a launcher and a source of settings here: what its configuration file asks for becomes a layer
between recipe and command line. A setting that cannot be honoured is refused, with the key to use instead.

Source of the names: accelerate/utils/launch.py of accelerate 1.15.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky_dist.config.loader import Layer
from kandinsky_dist.errors import ConfigError

ORIGIN = "accelerate"
_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def accelerate_layer(environ: Mapping[str, str]) -> Layer | None:
    """The settings of `accelerate launch`, or None if it did not start this process.

    Args:
        environ: the process's environment variables.

    Raises:
        ConfigError: a setting that the trainer does not serve, or decides by another key.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ:
        return None
    _refuse(environ)
    values: dict[str, Any] = {}
    precision = environ["ACCELERATE_MIXED_PRECISION"]
    if precision not in _PRECISIONS:
        raise ConfigError(
            f"mixed_precision={precision} ({ORIGIN}) is not served: use bf16, fp16, or no for fp32"
        )
    values["parallel.precision"] = _PRECISIONS[precision]
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        values.update(_deepspeed(environ))
    elif _is_on(environ, "ACCELERATE_USE_FSDP"):
        values.update(_fsdp(environ))
    elif int(environ.get("WORLD_SIZE", "1")) > 1:
        values["parallel.strategy"] = "ddp"
    return Layer(ORIGIN, values)


def _deepspeed(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    stage: Any = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # accelerate's own default
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path:
        try:
            settings = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"deepspeed_config_file={path} ({ORIGIN}): not readable as JSON: {error}"
            ) from error
        values["parallel.ds_config"] = path
        found = settings.get("zero_optimization", {}).get("stage", "auto")
        stage = stage if found == "auto" else found
        # With a file of DeepSpeed's, accelerate takes the precision from there.
        for precision in ("bf16", "fp16"):
            if settings.get(precision, {}).get("enabled") is True:
                values["parallel.precision"] = precision
    values["parallel.strategy"] = f"zero{stage}"
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        values["optim.max_grad_norm"] = float(clipping)
    return values


def _fsdp(environ: Mapping[str, str]) -> dict[str, Any]:
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"fsdp_version={version} ({ORIGIN}) is not served: set it to 2")
    if _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            f"fsdp_offload_params=true ({ORIGIN}) is not served: remove it, or use "
            "distributed_type DEEPSPEED with ds_configs/zero3_offload.json"
        )
    values: dict[str, Any] = {"parallel.strategy": "fsdp2"}
    if "FSDP_RESHARD_AFTER_FORWARD" in environ:
        values["parallel.reshard_after_forward"] = _is_on(environ, "FSDP_RESHARD_AFTER_FORWARD")
    if _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        values["parallel.gradient_checkpointing"] = True
    return values


def _refuse(environ: Mapping[str, str]) -> None:
    for variable, name, instead in (
        ("ACCELERATE_USE_MEGATRON_LM", "use_megatron_lm", "distributed_type DEEPSPEED, FSDP or MULTI_GPU"),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            "use_parallelism_config",
            "distributed_type DEEPSPEED, FSDP or MULTI_GPU",
        ),
    ):
        if _is_on(environ, variable):
            raise ConfigError(f"{name}=true ({ORIGIN}) is not served: use {instead}")
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ConfigError(f"dynamo_backend={backend} ({ORIGIN}) is not served: remove it or set it to no")
    for part in ("optimizer", "param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            raise ConfigError(
                f"offload_{part}_device={device} ({ORIGIN}) is not served: remove it or set it to none"
            )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", "none"):
        raise ConfigError(
            f"gradient_accumulation_steps={steps} ({ORIGIN}) cannot be set: accumulation is "
            "data.global_batch_size / (data.micro_batch_size x world size); set those and remove it"
        )


def _is_on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("true", "1", "yes", "y", "t", "on")
