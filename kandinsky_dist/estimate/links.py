"""Seconds of collectives: by NCCL's own latency-bandwidth model from published rates, or as measured here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal, Protocol

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.telemetry.devices import peak_tflops

Collective = Literal["all-reduce", "reduce-scatter", "all-gather"]

NVLINK_SHARE = 370 / 450
"""Of NVLink's line rate, what is left for data. Source: NCCL's maintainers in NVIDIA/nccl-tests issue 212
(protocol overhead of about 20 %: 370 of 450 GB/s on an H100)."""

NIC_SHARE = 47 / 50
"""Of a NIC's line rate. Source: NCCL's maintainers in NVIDIA/nccl-tests issue 290 (46 to 48 GB/s at 400
Gb/s)."""


@dataclass(frozen=True)
class Gpu:
    """Published figures of an accelerator in the servers that it is sold in; rates in bytes a second.

    Attributes:
        device_name: as torch names it, for its peak rate.
        memory_gib: what `nvidia-smi` lists.
        memory_rate: of its own memory.
        link_rate: of its links inside a node, in one direction; PCIe where it has no NVLink.
        nic_rate: of one NIC for each GPU, in one direction.
    """

    device_name: str
    memory_gib: float
    memory_rate: float
    link_rate: float
    nic_rate: float
    source: str

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOPs a second."""
        tflops = peak_tflops(self.device_name)
        assert tflops is not None, self.device_name
        return tflops * 1e12


GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 80.0, 2.039e12, 300e9, 25e9,
        "NVIDIA DGX A100 datasheet: NVLink 600 GB/s both ways, one 200 Gb/s NIC a GPU",
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 79.6, 3.35e12, 450e9, 50e9,
        "NVIDIA DGX H100 datasheet: NVLink 900 GB/s both ways, one 400 Gb/s NIC a GPU",
    ),
    "h200": Gpu(
        "NVIDIA H200", 140.4, 4.8e12, 450e9, 50e9,
        "NVIDIA DGX H200 datasheet: NVLink 900 GB/s both ways, one 400 Gb/s NIC a GPU",
    ),
    "b200": Gpu(
        "NVIDIA B200", 178.0, 7.7e12, 900e9, 50e9,
        "NVIDIA HGX B200 datasheet: NVLink 1,800 GB/s both ways, one 400 Gb/s NIC a GPU",
    ),
    "l40s": Gpu(
        "NVIDIA L40S", 45.0, 0.864e12, 32e9, 12.5e9,
        "NVIDIA L40S datasheet: PCIe 4.0 x16, no NVLink; a 100 Gb/s NIC a GPU is assumed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, spread evenly over nodes."""

    num_ranks: int
    num_nodes: int

    @classmethod
    def of(cls, num_ranks: int, ranks_per_node: int) -> "Group":
        """Neighbouring ranks on as few nodes as hold them."""
        num_nodes = -(-num_ranks // ranks_per_node)
        if num_ranks % num_nodes:
            raise ConfigError(
                f"{num_ranks} GPUs do not fill {num_nodes} nodes of {ranks_per_node} evenly: give --gpus a "
                "multiple of --gpus-per-node"
            )
        return cls(num_ranks, num_nodes)


class Links(Protocol):
    """What a collective takes."""

    def seconds(self, collective: Collective, num_bytes: float, group: Group) -> float:
        """Seconds of one call.

        Args:
            collective: what is called.
            num_bytes: of the longer side: what a rank puts in (all-reduce, reduce-scatter) or gets out.
            group: who takes part.
        """


@dataclass(frozen=True)
class _Protocol:
    """A way in which NCCL sends: latencies in microseconds, and its share of the bandwidth."""

    base: float
    inside: float  # a hop between GPUs of a node
    between: float  # a hop between nodes
    share: float


# Source: NCCL, src/graph/tuning.cc: baseLat, hwLat, and the factors on busBw.
_RINGS = (_Protocol(8.4, 3.4, 9.6, 1.0), _Protocol(10.0, 1.9, 4.0, 0.92))
_TREES = (_Protocol(0.0, 28.0, 50.0, 0.9), _Protocol(4.4, 1.2, 8.5, 0.9 * 0.915))


@dataclass(frozen=True)
class PublishedLinks:
    """NCCL on given link rates (bytes a second for one GPU in one direction, protocol overhead taken off).

    A ring over several nodes leaves each of them through all its NICs at once, so that a GPU is as fast as
    NVLink or as all NICs of its node's members together, whichever is slower. NCCL is taken to choose the
    quickest of rings and trees, with the Simple and the LL128 protocol; in-network reduction (SHARP) is left
    out.
    """

    link_rate: float
    nic_rate: float

    @classmethod
    def of(cls, gpu: Gpu, nic_gbits: float | None = None) -> "PublishedLinks":
        """Those of a GPU's usual server, with other NICs (Gb/s a GPU) where these are given."""
        nic_rate = gpu.nic_rate if nic_gbits is None else nic_gbits * 1e9 / 8
        return cls(gpu.link_rate * NVLINK_SHARE, nic_rate * NIC_SHARE)

    def seconds(self, collective: Collective, num_bytes: float, group: Group) -> float:
        """Seconds of one call."""
        if group.num_ranks == 1:
            return 0.0
        num_passes = 2 if collective == "all-reduce" else 1
        per_node = group.num_ranks // group.num_nodes
        rate = self.link_rate if group.num_nodes == 1 else min(self.link_rate, self.nic_rate * per_node)
        if per_node == 1:
            rate = self.nic_rate
        between = num_passes * (group.num_nodes - 1)
        inside = num_passes * (group.num_ranks - 1) - between
        crossing = num_passes * (group.num_ranks - 1) / group.num_ranks * num_bytes
        times = [
            (way.base + inside * way.inside + between * way.between) / 1e6 + crossing / (rate * way.share)
            for way in _RINGS
        ]
        if collective == "all-reduce":
            hops = [(per_node - 1) * way.inside + log2(group.num_nodes) * way.between for way in _TREES]
            times += [
                (way.base + 2 * hop) / 1e6 + 2 * num_bytes / (rate * way.share)
                for way, hop in zip(_TREES, hops, strict=True)
            ]
        return min(times)


@dataclass(frozen=True)
class MeasuredLinks:
    """Latency and bandwidth fitted to a record of `bench comm`, whose ranks were `num_ranks`.

    For other numbers of ranks both follow a ring's steps.

    Attributes:
        lines: collective -> (seconds of an empty call, seconds of a byte).
    """

    num_ranks: int
    lines: Mapping[str, tuple[float, float]]

    @classmethod
    def fitted(cls, points: Mapping[str, Sequence[tuple[float, float]]], num_ranks: int) -> "MeasuredLinks":
        """Lines through (bytes, seconds) with the least squared relative deviation."""
        return cls(num_ranks, {name: line_through(found) for name, found in points.items()})

    def seconds(self, collective: Collective, num_bytes: float, group: Group) -> float:
        """Seconds of one call."""
        if group.num_ranks == 1:
            return 0.0
        latency, per_byte = self.lines[collective]
        steps = (group.num_ranks - 1) / (self.num_ranks - 1)
        share = (group.num_ranks - 1) / group.num_ranks * self.num_ranks / (self.num_ranks - 1)
        return latency * steps + per_byte * share * num_bytes


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, with the least sum over points (x, y) of ((a + b x) / y - 1)^2."""
    u = [1 / y for _, y in points]
    v = [x / y for x, y in points]
    uu, vv, uv = (sum(p * q for p, q in zip(a, b, strict=True)) for a, b in ((u, u), (v, v), (u, v)))
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        a = (sum(u) * vv - sum(v) * uv) / determinant
        b = (sum(v) * uu - sum(u) * uv) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a >= 0:
            return sum(u) / uu, 0.0
    return 0.0, sum(v) / vv
