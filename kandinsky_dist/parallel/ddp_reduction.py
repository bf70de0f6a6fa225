"""How DDP cuts gradients into reductions, and in which type it sums them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kandinsky_dist.config.schema import ParallelConfig
from kandinsky_dist.errors import ConfigError

ONE_BUCKET_MIB = 2**20
"""Larger than any model's gradients: all of them are one bucket, full when backward is over."""

COMPRESSED = {"bf16": torch.bfloat16, "fp16": torch.float16}

Hook = Callable[[torch.dtype, dist.GradBucket], torch.futures.Future[Tensor]]


def bucket_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """DDP's arguments for the sizes of its buckets.

    Raises:
        ConfigError: this torch knows no first bucket of another size.
    """
    if not parallel.overlap:
        return {"bucket_cap_mb": ONE_BUCKET_MIB}
    if parallel.first_bucket_mib == 0:
        return {"bucket_cap_mb": parallel.bucket_mib}
    if "bucket_cap_mb_list" not in inspect.signature(DistributedDataParallel.__init__).parameters:
        raise ConfigError(
            f"parallel.first_bucket_mib={parallel.first_bucket_mib} needs a newer torch than "
            f"{torch.__version__} (2.13 has what it takes); 0 does without"
        )
    # The last size holds for all further buckets.
    return {"bucket_cap_mb_list": [parallel.first_bucket_mib, parallel.bucket_mib]}


def reduce_compressed(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook: the mean over ranks, summed in `dtype`, back in the bucket's own fp32.

    torch's own bf16 hook refuses any backend but NCCL. Divided before the cast: a sum of large gradients
    does not leave fp16's range. What does is infinite, and the guarded step skips it.
    """
    gradients = bucket.buffer()
    compressed = (gradients / dist.get_world_size()).to(dtype)
    if gradients.device.type == "cpu":
        # Waited for here. A callback would run on a thread of gloo's, and where that is still at it when
        # the program ends, the interpreter aborts ("terminate called without an active exception").
        dist.all_reduce(compressed)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradients.copy_(compressed))
        return done
    work = dist.all_reduce(compressed, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: gradients.copy_(summed.value()[0]))
