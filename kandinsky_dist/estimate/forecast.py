"""A run on a cluster that is not here: memory, step time, and what would be better."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from kandinsky_dist.config.schema import Config, ParallelConfig
from kandinsky_dist.estimate.links import Gpu, Links
from kandinsky_dist.estimate.memory import GIB, HEADROOM, Memory, memory
from kandinsky_dist.estimate.survey import HOLDS_FP32_WEIGHTS, Activations, Survey
from kandinsky_dist.estimate.time import Compute, StepTime, Traffic, step_time

DEFAULT_MFU = 0.365
DEFAULT_FIXED_SECONDS = 0.0135
"""Of a device's published peak at large micro-batches, and seconds of a micro-batch whatever its size: fitted
to MLPerf's runs on 8 and 64 H100 (`published.py`), a U-Net of 866 M weights in fp16 with CUDA graphs."""
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LARGE_BUCKET_MIB = 256.0
"""Tried beside the configuration's: between many ranks a bucket's latency counts more than an early start."""


@dataclass(frozen=True)
class Cluster:
    """Where the run would be."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    links: Links

    @property
    def room(self) -> float:
        """Bytes of a GPU that a run may fill."""
        return self.gpu.memory_gib * GIB * (1 - HEADROOM)


@dataclass(frozen=True)
class Assumptions:
    """What a time rests on where no record says it.

    Attributes:
        mfu: model FLOPs a second over the device's published peak, for large micro-batches.
        fixed_seconds: of a micro-batch whatever its size.
        measured: a single device's times, which then count instead.
        jitter: standard deviation of a rank's computing time, as a share of it.
    """

    mfu: float = DEFAULT_MFU
    fixed_seconds: float = DEFAULT_FIXED_SECONDS
    measured: Compute | None = None
    jitter: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """One configuration on one cluster.

    Attributes:
        num_micro: micro-batches a rank accumulates.
        largest: samples of the largest micro-batch that fits, whatever the global batch.
    """

    parallel: ParallelConfig
    num_gpus: int
    global_batch_size: int
    micro_batch_size: int
    num_micro: int
    memory: Memory
    time: StepTime
    room: float
    largest: int

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough."""
        return self.memory.total <= self.room

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs together."""
        return self.global_batch_size / self.time.total

    def as_row(self) -> dict[str, Any]:
        """For a record."""
        return {
            "strategy": self.parallel.strategy,
            "shard_size": self.parallel.shard_size,
            "bucket_mib": None if self.parallel.strategy == "fsdp2" else self.parallel.bucket_mib,
            "is_recomputed": self.parallel.gradient_checkpointing,
            "num_gpus": self.num_gpus,
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "num_micro": self.num_micro,
            **self.memory.as_row(),
            "room_bytes": self.room,
            "largest_micro_batch_size": self.largest,
            **{f"{name}_seconds": value for name, value in asdict(self.time).items()},
            "samples_per_second": self.samples_per_second,
        }


@dataclass(frozen=True)
class Forecaster:
    """Forecasts of one configuration's networks."""

    config: Config
    survey: Survey
    assumptions: Assumptions

    @property
    def precision(self) -> str:
        """`auto` is bf16 on a GPU."""
        name: str = self.config.parallel.precision
        return "bf16" if name == "auto" else name

    def flops_per_sample(self, *, is_recomputed: bool = False) -> float:
        """Of forward and backward, encoders included, and of forward once more where it is recomputed."""
        trained = 3.0 if self.config.model.variant == "full" else 2.0
        return self.survey.encoder_flops + self.survey.flops * (trained + is_recomputed)

    def forecast(
        self,
        cluster: Cluster,
        *,
        parallel: ParallelConfig | None = None,
        micro_batch_size: int | None = None,
        global_batch_size: int | None = None,
    ) -> Forecast:
        """Memory and time of one way to run it, by default the configuration's.

        Args:
            cluster: where.
            parallel: another strategy.
            micro_batch_size: another one.
            global_batch_size: another one; the micro-batches of all ranks divide it.
        """
        parallel = parallel or self.config.parallel
        micro = micro_batch_size or self.config.data.micro_batch_size
        total = global_batch_size or self.config.data.global_batch_size
        num_micro = total // (micro * cluster.num_gpus)
        num_averages = len(self.config.optim.ema_decay)
        held = memory(
            self.survey,
            parallel,
            self.precision,
            num_ranks=cluster.num_gpus,
            micro_batch_size=micro,
            num_micro=num_micro,
            num_averages=num_averages,
        )
        micro_seconds, encoder_seconds = self._compute(cluster, parallel, micro)
        time = step_time(
            parallel,
            Traffic(self.survey.num_trained, self.survey.num_values, self.survey.unit_values, self.precision),
            cluster.links,
            num_ranks=cluster.num_gpus,
            ranks_per_node=cluster.gpus_per_node,
            num_micro=num_micro,
            micro_seconds=micro_seconds,
            encoder_seconds=encoder_seconds,
            memory_rate=None if self.assumptions.measured else cluster.gpu.memory_rate,
            num_averages=num_averages,
            jitter=self.assumptions.jitter,
        )
        free = cluster.room - held.resident
        largest = self._activations(parallel).largest(free)
        if self.survey.encoding_per_sample:
            largest = min(largest, max(0, int(free // self.survey.encoding_per_sample)))
        return Forecast(
            parallel, cluster.num_gpus, total, micro, num_micro, held, time, cluster.room, largest
        )

    def _activations(self, parallel: ParallelConfig) -> Activations:
        return self.survey.activations(
            parallel.strategy in HOLDS_FP32_WEIGHTS, self.precision, parallel.gradient_checkpointing
        )

    def _compute(self, cluster: Cluster, parallel: ParallelConfig, micro: int) -> tuple[float, float]:
        """Seconds of a micro-batch, and of them the encoders'."""
        rate = cluster.gpu.peak_flops * self.assumptions.mfu
        flops = self.flops_per_sample(is_recomputed=parallel.gradient_checkpointing)
        encoder_share = self.survey.encoder_flops / flops
        if self.assumptions.measured is not None:
            seconds = self.assumptions.measured.seconds(micro)
            return seconds, seconds * encoder_share
        seconds = self.assumptions.fixed_seconds + flops * micro / rate
        return seconds, flops * encoder_share * micro / rate

    def largest_micro_batch(self, cluster: Cluster) -> int:
        """Samples of the largest micro-batch that fits, traced at that size; 0: the states alone do not."""
        asked, parallel = self.forecast(cluster), self.config.parallel
        size = asked.largest
        while size > 0:
            found = self.survey.trace(
                parallel.strategy,
                self.precision,
                is_recomputed=parallel.gradient_checkpointing,
                num_samples=size,
            )
            excess = asked.memory.resident + found.peak - cluster.room
            if excess <= 0:
                return size
            # Far from the sizes that the line goes through it may lie below the truth, by little.
            size -= max(1, ceil(excess / self._activations(parallel).per_sample))
        return 0

    def candidates(self, cluster: Cluster) -> list[Forecast]:
        """All that fit, quickest first: strategies, buckets, recomputation, micro-batches."""
        share = self.config.data.global_batch_size // cluster.num_gpus
        found = []
        for parallel in self._ways(cluster):
            for micro in _divisors(share):
                forecast = self.forecast(cluster, parallel=parallel, micro_batch_size=micro)
                if forecast.fits:
                    found.append(forecast)
        # Of two that are as quick, the one that leaves more room.
        return sorted(found, key=lambda item: (round(item.time.total, 5), item.memory.total))

    def _ways(self, cluster: Cluster) -> Iterator[ParallelConfig]:
        own = self.config.parallel
        for strategy in STRATEGIES:
            for is_recomputed in (False, True):
                way = replace(
                    own,
                    strategy=strategy,  # type: ignore[arg-type]
                    gradient_checkpointing=is_recomputed,
                    shard_size=0,
                    first_bucket_mib=0.0,
                    ds_config=own.ds_config if strategy == own.strategy else None,
                    overlap=True,
                    gradient_compression=own.gradient_compression if strategy == "ddp" else "none",
                )
                yield way
                if strategy != "fsdp2" and way.bucket_mib < LARGE_BUCKET_MIB:
                    yield replace(way, bucket_mib=LARGE_BUCKET_MIB)
                if strategy == "fsdp2" and cluster.num_gpus > cluster.gpus_per_node:
                    yield replace(way, shard_size=cluster.gpus_per_node)


def best_of_each(candidates: Sequence[Forecast]) -> list[Forecast]:
    """The quickest of each strategy, in the order given."""
    found: dict[tuple[str, int], Forecast] = {}
    for item in candidates:
        found.setdefault((item.parallel.strategy, item.parallel.shard_size), item)
    return list(found.values())


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
