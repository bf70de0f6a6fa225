"""DeepSpeed's configuration file: an ordinary file that a user may edit, completed by what the run owns."""

import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

import kandinsky_dist
from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.optional import require
from kandinsky_dist.parallel.loss_scale import GROWTH_STEPS, INITIAL, LEAST

BUCKET_UNIT = 2
"""DeepSpeed wants bucket sizes to be even, in elements."""


def shipped_file(strategy: str) -> Path:
    """`ds_configs/<strategy>.json`, in a wheel inside the package, in a checkout beside it."""
    package = Path(kandinsky_dist.__file__).parent
    folders = (package / "ds_configs", package.parent / "ds_configs")
    return next(path for folder in folders if (path := folder / f"{strategy}.json").is_file())


def complete(config: Config, *, world_size: int, num_micro: int, precision: torch.dtype) -> dict[str, Any]:
    """The file's settings with batch sizes, precision, clipping and stage filled in.

    Args:
        precision: of the weights that the engine holds; fp32 in stage 0.

    Raises:
        ConfigError: the file is no JSON, or sets one of those keys to something else.
    """
    path = (
        Path(config.parallel.ds_config)
        if config.parallel.ds_config
        else shipped_file(config.parallel.strategy)
    )
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"parallel.ds_config={path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"parallel.ds_config={path} must be an object of settings, is a {type(settings).__name__}"
        )
    stage = int(config.parallel.strategy.removeprefix("zero"))
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.data.global_batch_size, "data.global_batch_size"),
        "train_micro_batch_size_per_gpu": (config.data.micro_batch_size, "data.micro_batch_size"),
        "gradient_accumulation_steps": (num_micro, f"global_batch_size on {world_size} ranks"),
        # ZeRO-0 does not guard its own step; there the code clips and skips.
        "gradient_clipping": (config.optim.max_grad_norm if stage else 0.0, "optim.max_grad_norm"),
        "bf16.enabled": (precision == torch.bfloat16, "parallel.precision"),
        "fp16.enabled": (precision == torch.float16, "parallel.precision"),
        "zero_optimization.stage": (stage, f"parallel.strategy={config.parallel.strategy}"),
    }
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ConfigError(
                f"parallel.ds_config={path} sets {key}, which optim.* owns: remove it from the file"
            )
    if precision == torch.float16:
        # A fixed scale that is once too high would be so for ever.
        owned["fp16.loss_scale"] = (0, "which is a dynamic one")
    if stage and not config.parallel.overlap:
        owned["zero_optimization.overlap_comm"] = (False, "parallel.overlap")
    for dotted, (value, owner) in owned.items():
        _merge(settings, dotted.split("."), value, f"parallel.ds_config={path}", owner)
    if precision == torch.float16:
        _fill_in_loss_scale(settings["fp16"])
    zero = settings["zero_optimization"]
    if stage and zero.get("overlap_comm", "auto") == "auto":
        zero["overlap_comm"] = config.parallel.overlap
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device", "none") != "none":
        _keep_state_readable(offload, path)
        # The optimizer is torch's, which works on a CPU's tensors too, not DeepSpeed's own.
        key = "zero_force_ds_cpu_optimizer"
        _merge(settings, [key], False, f"parallel.ds_config={path}", "optim.*")
    # Elements, not bytes: the same bucket in MiB whatever the communicated type.
    num_elements = int(config.parallel.bucket_mib * 2**20) // precision.itemsize
    num_elements = max(1, num_elements // BUCKET_UNIT) * BUCKET_UNIT
    zero.setdefault("reduce_bucket_size", num_elements)
    zero.setdefault("allgather_bucket_size", num_elements)
    return settings


def _fill_in_loss_scale(fp16: dict[str, Any]) -> None:
    """What the file leaves open about the loss scale is as in the strategies that scale by themselves."""
    for key, value in {
        "initial_scale_power": int(math.log2(INITIAL)),
        "loss_scale_window": GROWTH_STEPS,
        "min_loss_scale": int(LEAST),
        "hysteresis": 1,
    }.items():
        if fp16.get(key, "auto") == "auto":
            fp16[key] = value


def _keep_state_readable(offload: dict[str, Any], path: Path) -> None:
    """Refuses to offload the optimizer's state to where a checkpoint could not see it."""
    if offload.get("device") == "nvme":
        raise ConfigError(
            f"parallel.ds_config={path} sets offload_optimizer.device=nvme, where checkpoints cannot read "
            "the optimizer's state: use cpu (offload_param may be nvme)"
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"parallel.ds_config={path} sets offload_optimizer.ratio={offload['ratio']}, for which DeepSpeed "
            "makes a second optimizer that optim.* does not reach: remove it"
        )


def _merge(tree: dict[str, Any], path: list[str], value: Any, where: str, owner: str) -> None:
    """Sets a nested key, or raises where the file already says something else ("auto" says nothing)."""
    *parents, leaf = path
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{where} sets {name}={tree}, which must be an object of settings")
    found = tree.get(leaf, "auto")
    if found != "auto" and found != value:
        raise ConfigError(
            f"{where} sets {'.'.join(path)}={found}, the run has {value} ({owner}): make them agree or "
            "remove it"
        )
    tree[leaf] = value


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, on the right accelerator, without its slow build step on a CPU."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    deepspeed = require("deepspeed", extra="deepspeed", why="a zero strategy")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch 2.13 renamed; nothing that its user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device_type == "cpu":
        # Its shared-memory all-reduce is compiled for a minute at first use and sums in another order
        # than gloo; a CPU run is for trying things out, where neither is wanted.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def release_groups() -> None:
    """Drop DeepSpeed's reference to its clone of the world's group, which it keeps beside its engines."""
    import deepspeed.utils.groups

    deepspeed.utils.groups._WORLD_GROUP = None
