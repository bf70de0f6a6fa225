"""A small regression that every way of reducing gradients trains; and the same by one plain loop."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kandinsky_dist.checkpoint.layout import CheckpointReader, RankTensors, write_tensors
from kandinsky_dist.config.schema import Config, DataConfig, OptimConfig, ParallelConfig
from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import Fragment, ModelPlan, Strategy
from kandinsky_dist.parallel.ddp import DDPStrategy
from kandinsky_dist.parallel.select import select
from kandinsky_dist.runtime.process import Process, joined

NUM_STEPS, HALF = 20, 10
BATCH_SIZE = 12
WIDTH, DEPTH = 48, 6
LEARNING_RATE = 1e-3
EMA_DECAY = 0.9
OPTIM = OptimConfig(weight_decay=0.01, max_grad_norm=0.05)


class Net(nn.Module):
    """Layers of 9.2 KiB, so that the tests' buckets hold one or a few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) + hidden
        return hidden


def weights(seed: int) -> dict[str, Tensor]:
    """Initial weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in Net().state_dict().items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, all ranks' samples."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs, targets = torch.randn(2, BATCH_SIZE, WIDTH, generator=generator)
    return inputs, targets


def plain_training() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters after the steps, and their moving average, by torch alone in one process."""
    model = Net()
    model.load_state_dict(weights(0))
    matrices, others = (
        [item for item in model.parameters() if (item.ndim > 1) is wanted] for wanted in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": OPTIM.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, foreach=False, fused=False)
    averages = {name: item.detach().clone() for name, item in model.named_parameters()}
    for step in range(NUM_STEPS):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        for name, item in model.named_parameters():
            averages[name] = EMA_DECAY * averages[name] + (1 - EMA_DECAY) * item.detach()
    return {name: item.detach() for name, item in model.named_parameters()}, averages


def train_all(cases: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Trains each case; OUT/CASE/rank_*.safetensors are its fragments, OUT/CASE/facts_RANK.json what it saw.

    A case is settings of `parallel`, `num_micro`, the `seed` of its initial weights, and `load_from`: what
    it goes on from, half-way (NAME_half, left by case NAME) or at the end (NAME), where nothing is trained.
    """
    with joined() as process:
        for name, case in cases.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / f"{name}_half").mkdir(exist_ok=True)
            (out / f"{name}_average").mkdir(exist_ok=True)
            dist.barrier()
            _train(name, dict(case), out, process)
            dist.barrier()


def _train(name: str, case: dict[str, Any], out: Path, process: Process) -> None:
    num_micro = case.pop("num_micro", 1)
    micro = BATCH_SIZE // num_micro // process.world_size
    source, seed = case.pop("load_from", None), case.pop("seed", 0)
    config = Config(
        stage="prior",
        data=DataConfig(global_batch_size=BATCH_SIZE, micro_batch_size=micro),
        optim=OPTIM,
        parallel=ParallelConfig(**case),
    )
    strategy = select(config, process, num_micro=num_micro)
    model = strategy.prepare(ModelPlan(Net, partial(weights, seed), partial(build_adamw, config=OPTIM)))
    first_step = 0
    if source is not None:
        first_step = HALF if source.endswith("_half") else NUM_STEPS
        strategy.load_fragments(CheckpointReader(out / source), num_steps=first_step)
    file = f"rank_{process.rank:05d}.safetensors"
    averages = [fragment.master.clone() for fragment in strategy.fragments()]
    facts: dict[str, Any] = {"errors": []}
    for step in range(first_step, NUM_STEPS):
        if step == HALF:
            write_tensors(out / f"{name}_half" / file, RankTensors.of(strategy.fragments()))
        _accumulate(strategy, model, step, process, num_micro, facts)
        strategy.step(learning_rate=LEARNING_RATE)
        for average, fragment in zip(averages, strategy.fragments(), strict=True):
            average.lerp_(fragment.master, 1 - EMA_DECAY)
    held = strategy.fragments()
    write_tensors(out / name / file, RankTensors.of(held))
    moved = [
        Fragment(item.name, item.start, item.numel, average, item.exp_avg, item.exp_avg_sq)
        for item, average in zip(held, averages, strict=True)
    ]
    write_tensors(out / f"{name}_average" / file, RankTensors.of(moved))
    if isinstance(strategy, DDPStrategy) and first_step < NUM_STEPS:
        assert strategy._ddp is not None
        sizes = strategy._ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
        facts["bucket_bytes"] = [int(size) for size in sizes.split(",")]
        flat = torch.cat([item.detach().flatten() for item in model.parameters()])
        facts["sum_bits"] = flat.view(torch.int32).sum(dtype=torch.int64).item()
    (out / name / f"facts_{process.rank}.json").write_text(json.dumps(facts))


def _accumulate(
    strategy: Strategy, model: nn.Module, step: int, process: Process, num_micro: int, facts: dict[str, Any]
) -> None:
    """The micro-batches of a step, this rank's part; compressed gradients are held to their bound."""
    inputs, targets = (part.chunk(num_micro * process.world_size) for part in batch(step))
    mine = range(process.rank, num_micro * process.world_size, process.world_size)

    def loss_of(module: Callable[[Tensor], Tensor], index: int) -> Tensor:
        return (module(inputs[index]) - targets[index]).square().mean() / num_micro

    for number, index in enumerate(mine):
        with strategy.accumulate(is_last=number == num_micro - 1):
            strategy.backward(loss_of(model, index))
    kind = strategy.config.parallel.gradient_compression
    if kind != "none":
        own = Net()
        own.load_state_dict({name: item.detach() for name, item in model.module.named_parameters()})
        sum(loss_of(own, index) for index in mine).backward()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        for reduced, local in zip(model.parameters(), own.parameters(), strict=True):
            gathered = [torch.empty_like(local.grad) for _ in range(process.world_size)]
            dist.all_gather(gathered, local.grad)
            exact = torch.stack(gathered).double() / process.world_size
            difference = (reduced.grad.double() - exact.sum(0)).abs()
            facts["errors"].append((difference - bound(exact, dtype)).max().item())
            facts["is_rounded"] = bool((reduced.grad == reduced.grad.to(dtype).float()).all())
            facts["is_fp32"] = reduced.grad.dtype == reduced.dtype == torch.float32


def bound(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a sum in `dtype` of the ranks' shares (first dimension, fp64) may be from their exact sum.

    Rounding to nearest changes a value by a factor within 1 +- u, u half the spacing of 1's neighbours, or
    below the normal numbers by half the smallest one's spacing. Each share is rounded once by the cast, and
    the sum of N is rounded N - 1 times: every share passes through at most N roundings, so the error is
    within ((1 + u)^N - 1) times the sum of the shares' sizes. fp32's own roundings, in the backward that is
    compared and in the division, are 2^-24 each; 2^-18 of the shares' sizes has room for 64 of them.
    """
    kind = torch.finfo(dtype)
    unit, num_roundings = kind.eps / 2, len(shares)
    sizes = shares.abs().sum(0)
    return ((1 + unit) ** num_roundings - 1 + 2**-18) * sizes + num_roundings * kind.tiny * unit + 2**-30
