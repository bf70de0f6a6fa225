"""This process among all ranks: its device, and the process group for as long as it trains."""

import gc
import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.errors import ConfigError, KandinskyError, StoppedError
from kandinsky_dist.runtime.deadline import deadline
from kandinsky_dist.runtime.heap import keep_freed_memory

DEFAULT_TIMEOUT = timedelta(minutes=30)

_timeout = DEFAULT_TIMEOUT
"""Of the group that `joined` made last; torch does not tell."""

NUM_RECORDED_COLLECTIVES = 20_000
"""A few steps of a full-size model on any engine; a few hundred bytes each."""


@dataclass(frozen=True)
class Process:
    """This process among all ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    _releases: list[Callable[[], Callable[[], None] | None]] = field(
        default_factory=list, repr=False, compare=False
    )

    def before_leaving(self, release: Callable[[], None]) -> None:
        """Have `release` called before the process groups are destroyed; a method, if its object still lives.

        For owners that would outlive a group. The last one to go waits for the group's threads, which may
        need the interpreter's lock: Python's own references are dropped without that lock, but others, such
        as that of DDP's reducer, are not and would wait forever.
        """
        is_method = inspect.ismethod(release)
        self._releases.append(weakref.WeakMethod(release) if is_method else lambda: release)

    def release_groups(self) -> None:
        """Call what `before_leaving` was given, the latest first."""
        while self._releases:
            release = self._releases.pop()()
            if release is not None:
                release()

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, which alone writes what is written once."""
        return self.rank == 0


@contextmanager
def joined(
    timeout: timedelta = DEFAULT_TIMEOUT, run_dir: Path | None = None, *, is_recorded: bool = False
) -> Iterator[Process]:
    """Join the process group for the length of the context.

    A process group is made for a single process too, so that there is one code path.

    Args:
        timeout: longest that a collective waits for a rank; `cpu_group` takes it over.
        run_dir: where NCCL leaves its last collectives when one of them times out, in nccl_flight_RANK.
        is_recorded: the outcome has been recorded when the context ends. A process that hangs while it leaves
            its groups is then ended with the exit code of that outcome (0, or 75 after a stop), else with 1.

    Raises:
        ConfigError: the launcher's variables contradict each other or the number of GPUs.
    """
    ranks = read_ranks(os.environ)
    device = device_of(ranks.local_rank)
    if run_dir is not None:
        _keep_flight_record(run_dir / "nccl_flight_")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Functions there take the default group of the moment of their import as a default argument: imported
    # later, by DDP for example, they would keep the group after it is destroyed.
    import torch.distributed.nn.functional  # noqa: F401

    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    global _timeout
    _timeout = timeout
    # DeepSpeed reads these even where the group stands; what is started afterwards must not.
    names = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size}
    made = [name for name in names if name not in os.environ]
    os.environ.update({name: str(value) for name, value in names.items()})
    process = Process(ranks.rank, ranks.local_rank, ranks.world_size, device)
    try:
        yield process
    except Exception as error:
        # After any other error the group is not left: that can wait for ranks that wait for this one.
        if getattr(error, "exit_code", None) == StoppedError.exit_code:
            leave(process, StoppedError.exit_code if is_recorded else KandinskyError.exit_code)
        raise
    finally:
        for name in made:
            os.environ.pop(name, None)
    leave(process, 0 if is_recorded else KandinskyError.exit_code)


def leave(process: Process, exit_code: int) -> None:
    """Destroy all process groups, after what owns them has let go of them.

    Args:
        process: this one.
        exit_code: with which the process is ended if it hangs here, see `deadline`.
    """
    with deadline(exit_code):
        process.release_groups()
        gc.collect()  # owners in reference cycles go now, while the groups are still there
        dist.destroy_process_group()


def cpu_group() -> dist.ProcessGroup:
    """Another group of all ranks, over gloo, as patient as the first. Collective: call on every rank."""
    group = dist.new_group(backend="gloo", timeout=_timeout)
    assert group is not None
    return group


def _keep_flight_record(prefix: Path) -> None:
    """Asks NCCL to remember its last collectives; what the environment says already stands.

    Must come before the process group is made. The file is given under its newer and its older name; of the
    buffer's older one torch 2.9 and later would warn on every rank.
    """
    for name, value in (
        ("FR_BUFFER_SIZE", NUM_RECORDED_COLLECTIVES),
        ("NCCL_DUMP_ON_TIMEOUT", 1),
        ("FR_DUMP_TEMP_FILE", prefix),
        ("NCCL_DEBUG_INFO_TEMP_FILE", prefix),
    ):
        os.environ.setdefault(f"TORCH_{name}", str(value))


def device_of(local_rank: int) -> torch.device:
    """The GPU that a process of this node has for itself, or the CPU where there are none.

    Raises:
        ConfigError: more processes than GPUs.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        local_rank = 0  # srun --gpus-per-task=1 shows each task its own GPU only
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank} has no GPU of its own: this node shows {count}")
    torch.cuda.set_device(local_rank)
    _settle_arithmetic()
    return torch.device("cuda", local_rank)


def _settle_arithmetic() -> None:
    """How a GPU computes what is in fp32, and how it finds its convolutions.

    Products and convolutions of fp32 values run as TF32, with 10 bits of mantissa and sums in fp32: several
    times as fast, and still finer than bf16's 7 bits. Shapes are few, so the fastest convolution of each is
    found by trying, which may end differently in another process: the same bits are not promised there.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
