"""Which number formats a training step really uses: what the ranks of the test of precision run."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_dist.bench.states import _GRADIENT_HOLDERS, _tensors
from kandinsky_dist.bench.workload import build, random_weights, workload
from kandinsky_dist.checkpoint.layout import RankTensors, write_tensors
from kandinsky_dist.config.schema import Config, DataConfig, OptimConfig, ParallelConfig, Stage
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.optim.ema import Ema
from kandinsky_dist.parallel.base import FRAGMENT_KINDS, ModelPlan
from kandinsky_dist.parallel.ds_config import import_deepspeed
from kandinsky_dist.parallel.select import engine_precision, select
from kandinsky_dist.runtime.process import Process, joined

Case = tuple[Stage, str, str]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm")


class Watched(TorchDispatchMode):
    """Notes the types that operators of some kinds get, while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.types: defaultdict[str, set[torch.dtype]] = defaultdict(set)
        self._phase = ""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, namespace = operator.overloadpacket.__name__, operator.namespace
        kind = None
        if self._phase == "forward" and namespace == "aten":
            kind = "products" if name in PRODUCTS else "norm layers" if name in NORMS else None
            kind = "attention" if name.startswith("_scaled_dot_product") else kind
        elif self._phase == "backward" and namespace == "c10d" and "reduce" in name:
            kind = "reduced"
        if kind:
            self.types[kind] |= {item.dtype for item in _tensors([args]) if item.is_floating_point()}
        return operator(*args, **(kwargs or {}))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        yield
        self._phase = ""


def types_of_all(cases: Sequence[Case], out: Path) -> list[dict[str, str]]:
    """For each case, what is in which type, in words."""
    # A CPU can do what DeepSpeed's fp16 takes; DeepSpeed thinks otherwise.
    import_deepspeed("cpu").get_accelerator().is_fp16_supported = lambda: True
    with joined() as process:
        return [_types(case, process, out) for case in cases]


def _types(case: Case, process: Process, out: Path) -> dict[str, str]:
    stage, strategy_name, precision = case
    config = Config(
        stage=stage,
        data=DataConfig(global_batch_size=2 * process.world_size, micro_batch_size=1),
        optim=OptimConfig(weight_decay=0.01),
        parallel=ParallelConfig(strategy=strategy_name, precision=precision),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    structure = partial(build, stage, "tiny")
    objective, prepared = workload(stage, "tiny", process)
    assert engine_precision(config, process.device) in SHORT
    strategy = select(config, process, num_micro=2)
    optimizer = partial(build_adamw, config=config.optim)
    model = strategy.prepare(ModelPlan(structure, partial(random_weights, structure), optimizer))
    types: dict[str, set[torch.dtype]] = {
        "weights": {getattr(item, "ds_tensor", item).dtype for item in model.parameters()}
    }

    def called(*inputs: Any, **others: Any) -> Any:
        types["noised samples"] = {
            item.dtype for item in _tensors([inputs, others]) if item.is_floating_point()
        }
        return model(*inputs, **others)

    with Watched() as watched:
        for is_last in (False, True):
            with strategy.accumulate(is_last=is_last):
                with watched.phase("forward"):
                    losses_B = objective.losses(called, prepared)
                with watched.phase("backward"):
                    strategy.backward(losses_B.mean() / 2)
    types |= watched.types
    wrapper = getattr(model, "optimizer", None)
    held = [item.grad for item in model.parameters()]
    held += [getattr(wrapper, name, None) for name in _GRADIENT_HOLDERS]
    types["gradients"] = {item.dtype for item in _tensors(held)}
    outcome = strategy.step(learning_rate=1e-3)
    fragments = strategy.fragments()
    types["loss"] = {losses_B.dtype}
    types["norm"] = {outcome.grad_norm.dtype}
    types["masters and moments"] = {
        getattr(item, kind).dtype for item in fragments for kind in FRAGMENT_KINDS
    }
    ema = Ema([0.9], [item.master for item in fragments], process.device)
    types["averages"] = {item.dtype for items in ema.tensors().values() for item in items}
    path = out / f"{process.rank}.safetensors"
    write_tensors(path, RankTensors.of(fragments, ema.tensors()))
    with safe_open(path, framework="pt") as file:
        types["checkpoint"] = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    return {kind: ", ".join(sorted(SHORT[item] for item in found)) for kind, found in types.items()}
