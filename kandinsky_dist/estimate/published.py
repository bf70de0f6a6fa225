"""Others' published results of scaling, and what the model of time makes of them.

Nothing here is tuned point by point. `fitted` has two parameters, the computing time of a micro-batch as a
line, from the two smallest runs; the two largest are predicted.
"""

from dataclasses import dataclass

from kandinsky_dist.estimate.links import GPUS, Group, PublishedLinks
from kandinsky_dist.estimate.time import (
    ADAMW_BYTES,
    BACKWARD_SHARE,
    CLIP_APART_BYTES,
    MEMORY_SHARE,
    NORM_BYTES,
    Compute,
    walk,
)

ONE_NODE_RATE = 137.3
"""Images a second of one GPU among 8 (MLPerf training 4.1, Stable Diffusion v2 at 512 pixels, latents and
text encoded beforehand, NVIDIA's DGX H100)."""


@dataclass(frozen=True)
class Point:
    """A published run.

    Attributes:
        num_gpus: H100s, 8 a node, a 400 Gb/s NIC each.
        micro_batch_size: samples a GPU and step, from the names of the submission's configurations:
            config_DGXH100_01x08x32, 08x08x16, 64x08x04 and 128x08x02 are nodes x GPUs x samples.
        scaling: rate of a GPU over that of one among 8.
    """

    num_gpus: int
    micro_batch_size: int
    scaling: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.micro_batch_size / (ONE_NODE_RATE * self.scaling)


MLPERF = (Point(8, 32, 1.0), Point(64, 16, 0.91), Point(512, 4, 0.56), Point(1024, 2, 0.39))
NUM_FITTED = 2
"""The first two of `MLPERF`; the others are predicted."""

# Of the submission's settings: 865,910,724 weights; gradients and weights are exchanged in fp16 in 6 buckets;
# AdamW is sharded inside a node (distribute_within_nodes); reductions run beside backward, gathering after.
NUM_WEIGHTS, NUM_BUCKETS, FP16, GPUS_PER_NODE = 865_910_724, 6, 2.0, 8


def fitted() -> Compute:
    """The computing time of a micro-batch that the two smallest runs leave, communication taken off."""
    compute = Compute(0.0, 0.0, "")
    # What hides communication is the computing time itself: a few rounds agree with themselves.
    for _ in range(20):
        (small, small_rest), (large, large_rest) = (
            (point, point.seconds - beside_computing(point, compute)) for point in MLPERF[:NUM_FITTED]
        )
        slope = (small_rest - large_rest) / (small.micro_batch_size - large.micro_batch_size)
        compute = Compute(
            large_rest - slope * large.micro_batch_size, slope, "MLPerf training 4.1, 8 and 64 H100"
        )
    return compute


def predicted_seconds(point: Point, compute: Compute) -> float:
    """Of a step of the published run, by the model."""
    return compute.seconds(point.micro_batch_size) + beside_computing(point, compute)


def steady_scaling(point: Point, compute: Compute) -> float:
    """What the model keeps of one node's rate on as many GPUs with one node's micro-batch."""
    first = MLPERF[0]
    same = Point(point.num_gpus, first.micro_batch_size, 1.0)
    return predicted_seconds(first, compute) / predicted_seconds(same, compute)


def beside_computing(point: Point, compute: Compute) -> float:
    """Seconds of communication that nothing hides, and of the update."""
    gpu = GPUS["h100"]
    links = PublishedLinks.of(gpu)
    node = Group(GPUS_PER_NODE, 1)
    num_nodes = point.num_gpus // GPUS_PER_NODE
    bucket_bytes = NUM_WEIGHTS * FP16 / NUM_BUCKETS
    reduce = links.seconds("reduce-scatter", bucket_bytes, node)
    reduce += links.seconds("all-reduce", bucket_bytes / GPUS_PER_NODE, Group(num_nodes, num_nodes))
    gather = NUM_BUCKETS * links.seconds("all-gather", bucket_bytes, node)
    backward = BACKWARD_SHARE * compute.seconds(point.micro_batch_size)
    exposed = walk([(0.0, backward / NUM_BUCKETS, reduce)] * NUM_BUCKETS, 0) - backward
    passes = NUM_WEIGHTS / GPUS_PER_NODE * (ADAMW_BYTES + NORM_BYTES + CLIP_APART_BYTES)
    return exposed + gather + passes / (gpu.memory_rate * MEMORY_SHARE)
