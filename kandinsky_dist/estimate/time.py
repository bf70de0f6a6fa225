"""Seconds of an optimizer step: computing, what communication adds to it, and the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt

from kandinsky_dist.config.schema import ParallelConfig
from kandinsky_dist.estimate.links import Group, Links, line_through
from kandinsky_dist.estimate.textbook import LOW_BYTES

FP32 = 4.0
BACKWARD_SHARE = 2 / 3
"""Of forward and backward: a product's gradients for its input and its weight are a product each."""
ADAMW_BYTES, NORM_BYTES, AVERAGE_BYTES = 28.0, 4.0, 32.0
"""Read and written by value: AdamW reads 16 and writes 12, the norm reads 4, an average is three passes over
two tensors (`optim/ema.py`)."""
CLIP_BYTES, CLIP_APART_BYTES = 4.0, 8.0
"""A clipped gradient is written by AdamW's own pass (`parallel/replicated.py`); in a pass of its own, which
DeepSpeed's stages 1 to 3 make of it, it is read as well."""
MEMORY_SHARE = 0.8
"""Of the published memory rate, what such passes reach: an H100 copies 3.0 TB/s of 3.35, small tensors
less."""
ZERO3_GATHERED_ELEMENTS = 50_000_000
"""Of weights that are asked for at once: stage3_prefetch_bucket_size of `ds_configs/zero3.json`."""
ZERO0_BUCKET_ELEMENTS = 500_000_000
"""Source: DeepSpeed 0.19, `runtime/engine.py`, MEMORY_OPT_ALLREDUCE_SIZE."""


@dataclass(frozen=True)
class Compute:
    """Seconds of one device for forward and backward of a micro-batch of b samples: fixed + per_sample x b.

    The fixed part is what a micro-batch costs whatever its size: weights that are read once, kernels too
    small to fill the device, launches.
    """

    fixed: float
    per_sample: float
    source: str

    def seconds(self, micro_batch_size: float) -> float:
        """Of a micro-batch, without any communication."""
        return self.fixed + self.per_sample * micro_batch_size

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]], source: str) -> "Compute":
        """Through (micro-batch size, seconds); a single point has no fixed part to be seen."""
        if len({size for size, _ in points}) == 1:
            return cls(0.0, sum(seconds / size for size, seconds in points) / len(points), source)
        return cls(*line_through(points), source)


@dataclass(frozen=True)
class Traffic:
    """What a strategy has to move and when.

    Attributes:
        num_trained: trained values.
        num_values: values of the whole network.
        unit_values: trained values of each block, in order, and of what is outside of the blocks at the end.
        precision: "bf16", "fp16" or "fp32".
    """

    num_trained: float
    num_values: float
    unit_values: tuple[float, ...]
    precision: str


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every rank.

    Attributes:
        compute: forward, backward and encoders of all micro-batches.
        communication: all collectives, hidden or not.
        exposed: what they add to the step.
        update: clipping, AdamW and averages.
        waiting: for the slowest rank.
    """

    compute: float
    communication: float
    exposed: float
    update: float
    waiting: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed + self.update + self.waiting


def step_time(
    parallel: ParallelConfig,
    traffic: Traffic,
    links: Links,
    *,
    num_ranks: int,
    ranks_per_node: int,
    num_micro: int,
    micro_seconds: float,
    encoder_seconds: float = 0.0,
    memory_rate: float | None = None,
    num_averages: int = 0,
    jitter: float = 0.0,
) -> StepTime:
    """Puts a step together.

    Args:
        parallel: strategy, buckets, overlap, shard size.
        traffic: what is moved.
        links: how fast.
        num_ranks: GPUs.
        ranks_per_node: of them, on one node.
        num_micro: micro-batches a rank accumulates.
        micro_seconds: forward and backward of one of them, encoders included.
        encoder_seconds: of these, frozen encoders, which no communication hides behind.
        memory_rate: bytes a second of the device's memory; None: the update is in `micro_seconds` or nothing.
        num_averages: decays of optim.ema_decay.
        jitter: standard deviation of a rank's computing time, as a share of it; the slowest of N ranks is
            expected sqrt(2 ln N) deviations behind.
    """
    trained_seconds = micro_seconds - encoder_seconds
    forward, backward = trained_seconds * (1 - BACKWARD_SHARE), trained_seconds * BACKWARD_SHARE
    whole = Group.of(num_ranks, ranks_per_node)
    moved, exposed = _exchange(parallel, traffic, links, whole, num_micro, forward, backward)
    owners = num_ranks if parallel.strategy in ("fsdp2", "zero1", "zero2", "zero3") else 1
    if parallel.strategy == "fsdp2" and parallel.shard_size:
        owners = parallel.shard_size
    update = 0.0
    if memory_rate is not None:
        clip = CLIP_APART_BYTES if parallel.strategy in ("zero1", "zero2", "zero3") else CLIP_BYTES
        passes = traffic.num_trained * (
            (ADAMW_BYTES + NORM_BYTES + clip) / owners + AVERAGE_BYTES * num_averages / num_ranks
        )
        update = passes / (memory_rate * MEMORY_SHARE)
    compute = num_micro * micro_seconds
    waiting = compute * jitter * sqrt(2 * log(num_ranks)) if num_ranks > 1 else 0.0
    return StepTime(compute, moved, exposed, update, waiting)


def _exchange(
    parallel: ParallelConfig,
    traffic: Traffic,
    links: Links,
    whole: Group,
    num_micro: int,
    forward: float,
    backward: float,
) -> tuple[float, float]:
    """Seconds of all collectives of a step, and the part of them that nothing hides."""
    if whole.num_ranks == 1:
        return 0.0, 0.0
    if parallel.strategy == "fsdp2":
        return _fsdp2(parallel, traffic, links, whole, num_micro, forward, backward)
    low, bucket_bytes = LOW_BYTES[traffic.precision], parallel.bucket_mib * 2**20
    if parallel.strategy == "zero3":
        # Weights come in pieces ahead of the layers, and gradients go in buckets, in every micro-batch.
        num_units = max(1, ceil(traffic.num_values / ZERO3_GATHERED_ELEMENTS))
        gather = links.seconds("all-gather", traffic.num_values * low / num_units, whole)
        size = traffic.num_trained * low / num_units
        num_calls = max(1, ceil(size / bucket_bytes))
        reduce = num_calls * links.seconds("reduce-scatter", size / num_calls, whole)
        ahead = walk([(gather, forward / num_units, 0.0)] * num_units, depth=1)
        back = walk([(gather, backward / num_units, reduce)] * num_units, depth=1)
        moved = num_units * (2 * gather + reduce)
        return num_micro * moved, num_micro * (ahead + back - forward - backward)
    # DeepSpeed 0.19 sums a bucket with an all-reduce under stages 1 and 2 too, as its buckets hold several
    # ranks' shares (stage_1_and_2.py, use_multi_rank_bucket_allreduce).
    is_sharded = parallel.strategy in ("zero1", "zero2")
    num_bytes = traffic.num_trained * (low if is_sharded else _ddp_bytes(parallel))
    if parallel.strategy == "zero0":
        bucket_bytes = ZERO0_BUCKET_ELEMENTS * FP32
    elif parallel.strategy == "ddp" and not parallel.overlap:
        bucket_bytes = num_bytes
    num_buckets = max(1, ceil(num_bytes / bucket_bytes))
    reduce = links.seconds("all-reduce", num_bytes / num_buckets, whole)
    moved = num_buckets * reduce
    exposed = moved
    if parallel.overlap and parallel.strategy != "zero0":
        exposed = walk([(0.0, backward / num_buckets, reduce)] * num_buckets, depth=0) - backward
    if parallel.strategy == "zero2":
        moved, exposed = num_micro * moved, num_micro * exposed
    if is_sharded:
        gather = num_buckets * links.seconds("all-gather", traffic.num_trained * low / num_buckets, whole)
        moved, exposed = moved + gather, exposed + gather
    return moved, exposed


def _fsdp2(
    parallel: ParallelConfig,
    traffic: Traffic,
    links: Links,
    whole: Group,
    num_micro: int,
    forward: float,
    backward: float,
) -> tuple[float, float]:
    shard_size = parallel.shard_size or whole.num_ranks
    shards = Group.of(shard_size, whole.num_ranks // whole.num_nodes)
    num_copies = whole.num_ranks // shard_size
    # The ranks that hold the same shard are each on a node of its own, unless a node holds several copies.
    copies = Group(num_copies, min(num_copies, whole.num_nodes))
    low = LOW_BYTES[traffic.precision]
    blocks = [values for values in traffic.unit_values if values]
    total = sum(blocks)

    def gather(values: float) -> float:
        return links.seconds("all-gather", values * low, shards)

    def reduce(values: float) -> float:
        inside = links.seconds("reduce-scatter", values * FP32, shards)
        return inside + links.seconds("all-reduce", values * FP32 / shard_size, copies)

    depth = parallel.prefetch_blocks
    ahead = [(gather(values), forward * values / total, 0.0) for values in blocks]
    again = [gather(values) if parallel.reshard_after_forward else 0.0 for values in blocks]
    back = [(time, backward * values / total, 0.0) for time, values in zip(again, blocks, strict=True)]
    last = [
        (time, backward * values / total, reduce(values)) for time, values in zip(again, blocks, strict=True)
    ]
    moved = num_micro * (sum(item[0] for item in ahead) + sum(again)) + sum(item[2] for item in last)
    hidden_behind = num_micro * (forward + backward)
    taken = num_micro * walk(ahead, depth) + (num_micro - 1) * walk(back[::-1], depth)
    return moved, taken + walk(last[::-1], depth) - hidden_behind


def _ddp_bytes(parallel: ParallelConfig) -> float:
    return FP32 if parallel.gradient_compression == "none" else 2.0


def walk(units: Sequence[tuple[float, float, float]], depth: int) -> float:
    """Seconds of one walk over units (gather, compute, reduce) whose collectives share one link.

    A unit computes when its weights are there; its gradients are sent when it is done; the weights of `depth`
    units are asked for ahead.
    """
    clock = link = 0.0
    arrivals: list[float] = []
    for index, (_, compute, reduce) in enumerate(units):
        while len(arrivals) <= min(index + depth, len(units) - 1):
            link = max(link, clock) + units[len(arrivals)][0]
            arrivals.append(link if units[len(arrivals)][0] else 0.0)
        clock = max(clock, arrivals[index]) + compute
        if reduce:
            link = max(link, clock) + reduce
    return max(clock, link)
