"""Rules between settings of the engine: how the network is spread, reduced, compiled. Never imports torch."""

from collections.abc import Iterator

from kandinsky_dist.config.loader import DEFAULT_ORIGIN, Resolved
from kandinsky_dist.config.schema import Config


def engine_problems(resolved: Resolved, world_size: int) -> Iterator[str]:
    """Every broken rule, one line each."""
    yield from _sharding(resolved, world_size)
    yield from _reduction(resolved)
    yield from _float8(resolved.config)
    yield from _compilation(resolved.config)


def _sharding(resolved: Resolved, world_size: int) -> Iterator[str]:
    parallel = resolved.config.parallel
    for name in ("shard_size", "reshard_after_forward", "prefetch_blocks"):
        key = f"parallel.{name}"
        if parallel.strategy != "fsdp2" and resolved.origins[key] != DEFAULT_ORIGIN:
            yield f"{key}={getattr(parallel, name)} needs parallel.strategy=fsdp2, it is {parallel.strategy}"
    if parallel.strategy == "fsdp2" and resolved.origins["parallel.bucket_mib"] != DEFAULT_ORIGIN:
        yield (
            f"parallel.bucket_mib={parallel.bucket_mib} does nothing under fsdp2, where each block is a "
            "bucket: remove it"
        )
    if parallel.shard_size > 0 and world_size % parallel.shard_size:
        yield f"parallel.shard_size={parallel.shard_size} must divide the number of ranks, {world_size}"


def _reduction(resolved: Resolved) -> Iterator[str]:
    parallel = resolved.config.parallel
    is_set = {
        name: resolved.origins[f"parallel.{name}"] != DEFAULT_ORIGIN
        for name in ("bucket_mib", "first_bucket_mib", "overlap", "static_graph", "gradient_compression")
    }
    for name in ("first_bucket_mib", "static_graph", "gradient_compression"):
        if is_set[name] and parallel.strategy != "ddp":
            yield (
                f"parallel.{name}={getattr(parallel, name)} needs parallel.strategy=ddp, it is "
                f"{parallel.strategy}"
            )
    if is_set["overlap"] and parallel.overlap and parallel.strategy == "zero0":
        yield "parallel.overlap=True needs another strategy than zero0, which reduces after backward: use ddp"
    if not parallel.overlap and parallel.strategy == "fsdp2":
        yield "parallel.overlap=False needs ddp or a zero strategy; fsdp2 always reduces beside backward"
    if not parallel.overlap and parallel.strategy == "ddp":
        for name in ("bucket_mib", "first_bucket_mib"):
            if is_set[name]:
                yield (
                    f"parallel.{name}={getattr(parallel, name)} does nothing with overlap=False, where all "
                    "gradients are one bucket: remove it"
                )
    if parallel.first_bucket_mib > parallel.bucket_mib:
        yield (
            f"parallel.first_bucket_mib={parallel.first_bucket_mib} must not be above bucket_mib="
            f"{parallel.bucket_mib}: it is there to be smaller"
        )


def _float8(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.float8:
        return
    if parallel.strategy not in ("ddp", "fsdp2"):
        yield f"parallel.float8=True needs parallel.strategy=ddp or fsdp2, it is {parallel.strategy}"
    if parallel.precision not in ("auto", "bf16"):
        yield f"parallel.float8=True needs parallel.precision=bf16, it is {parallel.precision}"
    if config.model.variant != "full":
        yield f"parallel.float8=True needs model.variant=full, it is {config.model.variant}"


def _compilation(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.compile:
        if parallel.compile_cache is not None:
            yield f"parallel.compile_cache={parallel.compile_cache} needs parallel.compile=true"
        return
    if parallel.strategy == "zero3":
        yield (
            "parallel.compile=True does not go with parallel.strategy=zero3, which gathers weights inside "
            "every layer: use zero2 or fsdp2, or parallel.compile=false"
        )
    if parallel.attention == "xformers":
        yield (
            "parallel.compile=True does not go with parallel.attention=xformers, whose kernels torch cannot "
            "compile around: use sdpa, or parallel.compile=false"
        )
