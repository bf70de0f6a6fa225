"""Rules that span several settings, checked before anything is started. Never imports torch."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from kandinsky_dist.config.engine_rules import engine_problems
from kandinsky_dist.config.loader import DEFAULT_ORIGIN, Resolved
from kandinsky_dist.config.schema import KEYS, Config, DataConfig
from kandinsky_dist.config.stretches import stretches
from kandinsky_dist.errors import ConfigError

_POSITIVE = (
    "run.max_steps",
    "data.global_batch_size",
    "data.micro_batch_size",
    "data.resolution",
    "data.read_ahead_mib",
    "data.cache_gib",
    "optim.learning_rate",
    "optim.adam_epsilon",
    "parallel.bucket_mib",
    "checkpoint.every_steps",
    "guard.spike_patience_steps",
    "watchdog.start_seconds",
    "watchdog.pause_seconds",
    "watchdog.heartbeat_seconds",
    "telemetry.log_every_steps",
    "validation.num_samples",
    "model.lora_rank",
    "objective.noise_draws",
)
_NOT_NEGATIVE = (
    "guard.max_nonfinite_steps",
    "guard.spike_threshold",
    "guard.max_rollbacks",
    "watchdog.step_seconds",
    "run.time_limit_seconds",
    "run.time_margin_seconds",
    "run.seed",
    "data.num_workers",
    "optim.lr_warmup_steps",
    "optim.weight_decay",
    "optim.max_grad_norm",
    "parallel.first_bucket_mib",
    "parallel.shard_size",
    "parallel.prefetch_blocks",
    "validation.every_steps",
)
_SHARES = ("data.caption_dropout", "data.image_embedding_dropout", "optim.adam_beta1", "optim.adam_beta2")
_WHOLE_SHARES = ("data.horizontal_flip", "data.max_bad_fraction", "watchdog.straggler_share")


def check(resolved: Resolved, *, world_size: int, with_packages: bool = True) -> None:
    """Raises the first broken rule as a ConfigError that names key, value and remedy."""
    if world_size < 1:
        raise ConfigError(f"--world-size={world_size} must be above 0")
    for problem in problems(resolved, world_size=world_size, with_packages=with_packages):
        raise ConfigError(problem)


def check_precompute(config: Config) -> None:
    """Raises what keeps a corpus from being encoded in advance as a ConfigError."""
    data = config.data
    if data.mixture:
        raise ConfigError("data.mixture is set: precompute one corpus of it at a time, as data.shards")
    if data.source != "raw":
        raise ConfigError(
            f"data.source={data.source}: precompute reads images and captions, with data.source=raw"
        )
    for problem in _one_view(data, "precompute"):
        raise ConfigError(problem)


def problems(
    resolved: Resolved, *, world_size: int, is_elsewhere: bool = False, with_packages: bool = True
) -> Iterator[str]:
    """Every broken rule, one line each; of a run elsewhere not those about its corpus and packages."""
    config = resolved.config
    yield from _ranges(config)
    yield from _stage_keys(resolved)
    yield from _batch_arithmetic(config, world_size)
    if not is_elsewhere:
        yield from _corpus(config.data)
    yield from _combinations(resolved)
    yield from engine_problems(resolved, world_size)
    yield from _watchdog(config)
    yield from _profiling(resolved, world_size)
    if with_packages and not is_elsewhere:
        yield from _packages(config)


def num_micro(config: Config, *, world_size: int) -> int:
    """Micro-batches that one rank accumulates in an optimizer step."""
    return config.data.global_batch_size // (config.data.micro_batch_size * world_size)


def run_dir(config: Config) -> Path:
    """The run's folder."""
    return Path(config.run.dir.replace("{stage}", config.stage))


def _ranges(config: Config) -> Iterator[str]:
    for key in KEYS:
        value = config.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} must be a finite number"
        if isinstance(value, str) and not value.strip():
            yield f"{key}={value} must not be empty"
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_POSITIVE, lambda value: value > 0, "above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_SHARES, lambda value: 0 <= value < 1, "in [0, 1)"),
        (_WHOLE_SHARES, lambda value: 0 <= value <= 1, "in [0, 1]"),
        (
            ("guard.spike_window_steps",),
            lambda value: value >= 10,
            "10 or more: fewer losses have no scale to measure a spike by",
        ),
        (("checkpoint.keep",), lambda value: value >= 2, "2 or more: the newest may be damaged"),
    )
    for keys, holds, rule in rules:
        for key in keys:
            if not holds(config.get(key)):
                yield f"{key}={config.get(key)} must be {rule}"
    decays = config.optim.ema_decay
    for decay in decays:
        if not 0 < decay < 1:
            yield f"optim.ema_decay={decay} must be above 0 and below 1; [] keeps no average"
    if len(set(decays)) < len(decays):
        yield f"optim.ema_decay={list(decays)} must not list a decay twice"
    if config.objective.snr_gamma is not None and config.objective.snr_gamma <= 0:
        yield f"objective.snr_gamma={config.objective.snr_gamma} must be above 0, or null for no weighting"


def _stage_keys(resolved: Resolved) -> Iterator[str]:
    for key, item in KEYS.items():
        owner = item.metadata["stage"]
        if owner not in (None, resolved.config.stage) and resolved.origins[key] != DEFAULT_ORIGIN:
            yield (
                f"{key}={resolved.config.get(key)} ({resolved.origins[key]}) applies to the {owner} only: "
                f"remove it, the {resolved.config.stage} would ignore it"
            )


def _batch_arithmetic(config: Config, world_size: int) -> Iterator[str]:
    total, micro = config.data.global_batch_size, config.data.micro_batch_size
    unit = micro * world_size
    if unit <= 0 or total % unit == 0:
        return
    below = total // unit * unit
    nearest = ", ".join(str(value) for value in (below, below + unit) if value > 0)
    yield (
        f"data.global_batch_size={total} must be a multiple of micro_batch_size x world_size "
        f"({micro} x {world_size} = {unit}); nearest: {nearest}"
    )


def _combinations(resolved: Resolved) -> Iterator[str]:
    config = resolved.config
    yield from _cached(config.data)
    if resolved.origins["data.group_by_length"] != DEFAULT_ORIGIN and config.data.source != "cached":
        yield (
            f"data.group_by_length={config.data.group_by_length} needs data.source=cached: how long captions "
            "are is not known before they are read"
        )
    if config.validation.every_steps and config.validation.shards is None:
        yield (
            f"validation.every_steps={config.validation.every_steps} needs validation.shards; "
            "0 switches validation off"
        )
    if config.optim.lr_warmup_steps and config.optim.lr_scheduler == "constant":
        yield (
            f"optim.lr_warmup_steps={config.optim.lr_warmup_steps} does nothing with lr_scheduler=constant: "
            "use constant_with_warmup"
        )
    if config.parallel.ds_config is not None and not config.parallel.strategy.startswith("zero"):
        yield (
            f"parallel.ds_config={config.parallel.ds_config} needs a zero strategy, "
            f"parallel.strategy is {config.parallel.strategy}"
        )
    if config.parallel.ds_config is not None and not Path(config.parallel.ds_config).is_file():
        yield f"parallel.ds_config={config.parallel.ds_config} is not a file"
    for key in ("guard.spike_window_steps", "guard.spike_patience_steps"):
        if resolved.origins[key] != DEFAULT_ORIGIN and config.guard.spike_threshold == 0:
            yield f"{key}={config.get(key)} needs guard.spike_threshold above 0"
    if resolved.origins["model.lora_rank"] != DEFAULT_ORIGIN and config.model.variant != "lora":
        yield f"model.lora_rank={config.model.lora_rank} needs model.variant=lora"
    if config.parallel.attention == "xformers" and config.stage == "prior":
        yield "parallel.attention=xformers applies to the decoder only; the prior runs torch's own: use sdpa"
    for key in config.run.allow_change:
        if key not in KEYS:
            yield f"run.allow_change lists {key}, which is no key"


def _profiling(resolved: Resolved, world_size: int) -> Iterator[str]:
    telemetry = resolved.config.telemetry
    try:
        stretches(telemetry.profile)
    except ConfigError as error:
        yield str(error)
    if resolved.origins["telemetry.profile_ranks"] != DEFAULT_ORIGIN and not telemetry.profile:
        yield f"telemetry.profile_ranks={list(telemetry.profile_ranks)} needs telemetry.profile"
    for rank in telemetry.profile_ranks:
        if not 0 <= rank < world_size:
            yield f"telemetry.profile_ranks has {rank}; ranks go from 0 to {world_size - 1}"


def _corpus(data: DataConfig) -> Iterator[str]:
    if data.shards is None and not data.mixture:
        yield "data.shards is not set: a folder of tar shards (kandinsky-dist data demo OUT makes one)"
    if data.shards is not None and data.mixture:
        yield f"data.shards={data.shards} and data.mixture are both set: give one of them"
    for part in data.mixture:
        shards, _, weight = part.rpartition("=")
        if not shards or not _is_weight(weight):
            yield f"data.mixture has {part!r}; each corpus is SHARDS=WEIGHT with a weight above 0"
    if not data.captions:
        yield "data.captions is empty: name at least one source, such as txt"
    is_pipe = (data.shards or "").startswith("pipe:")
    if data.source == "stream" and (data.mixture or data.aspect_buckets):
        yield "data.source=stream knows no data.mixture and no data.aspect_buckets: these need a manifest"
    if is_pipe and data.source != "stream":
        yield (
            "data.shards=pipe:... has no manifest: index the shards, or read it with data.source=stream and "
            "data.allow_pipe=true"
        )
    elif is_pipe and not data.allow_pipe:
        yield "data.shards=pipe:... runs a shell command: allow it with data.allow_pipe=true"


def _cached(data: DataConfig) -> Iterator[str]:
    if data.source == "cached":
        yield from _one_view(data, "data.source=cached")


def _one_view(data: DataConfig, what: str) -> Iterator[str]:
    """What cannot be chosen where a sample was encoded once."""
    if data.random_crop:
        yield f"data.random_crop=True needs data.source=raw: {what} has one crop of an image, its middle"
    if len(data.captions) > 1:
        yield (
            f"data.captions={list(data.captions)} chooses among captions, and {what} has one of a sample: "
            "name that one, or train with data.source=raw"
        )


def _watchdog(config: Config) -> Iterator[str]:
    watchdog = config.watchdog
    if watchdog.step_seconds == 0:
        return
    if watchdog.step_seconds < 5 * watchdog.heartbeat_seconds:
        yield (
            f"watchdog.step_seconds={watchdog.step_seconds} must be at least 5 x watchdog.heartbeat_seconds "
            f"({watchdog.heartbeat_seconds}): a late sign of life is no silence; 0 switches the watchdog off"
        )
    for key in ("watchdog.start_seconds", "watchdog.pause_seconds"):
        if config.get(key) < watchdog.step_seconds:
            yield f"{key}={config.get(key)} must not be below watchdog.step_seconds={watchdog.step_seconds}"


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _packages(config: Config) -> Iterator[str]:
    needs = [
        (
            config.parallel.strategy.startswith("zero"),
            "deepspeed",
            f"parallel.strategy={config.parallel.strategy}",
        ),
        (config.parallel.attention == "xformers", "xformers", "parallel.attention=xformers"),
        (config.model.variant == "lora", "peft", "model.variant=lora"),
        (config.parallel.float8, "torchao", "parallel.float8=true"),
    ]
    for is_needed, package, why in needs:
        if is_needed and importlib.util.find_spec(package) is None:
            extra = {"peft": "lora", "torchao": "float8"}.get(package, package)
            yield f"{why} needs the package {package}: pip install 'kandinsky-dist[{extra}]'"
