"""`bench optimizer`: seconds of an AdamW update, by implementation, on the shapes that an engine gives it.

On a GPU, for what lies there, and on the CPU, where offloaded states are. All implementations take turns on
the same weights and gradients in one process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.render import Column, provenance, table
from kandinsky_dist.bench.workload import build
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.parallel.ds_config import import_deepspeed
from kandinsky_dist.runtime.logs import say

LAYOUTS = ("parameters", "flat")
"""A tensor for each parameter, as ddp and fsdp2 have them; one tensor, as zero1 to zero3 do."""
ARGUMENTS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
BYTES_PER_VALUE = 7 * 4
"""Weight, gradient and two moments are read, all but the gradient written: fp32, each once."""
REFERENCE, CURRENT = "torch for-loop", "torch fused"
NUM_CHECKED_VALUES = 10_007

Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def contenders(device_type: str) -> dict[str, Make]:
    """Implementations by name that can work on tensors of the device; building them may still fail."""
    found: dict[str, Make] = {
        CURRENT: partial(torch.optim.AdamW, fused=True, **ARGUMENTS),
        "torch foreach": partial(torch.optim.AdamW, foreach=True, **ARGUMENTS),
        REFERENCE: partial(torch.optim.AdamW, foreach=False, **ARGUMENTS),
    }
    if find_spec("deepspeed") is not None:
        if device_type == "cpu":
            found["deepspeed CPUAdam"] = _cpu_adam
        if device_type == "cuda" or not torch.cuda.is_available():
            found["deepspeed FusedAdam"] = _fused_adam
    return found


def _cpu_adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **ARGUMENTS)
    return made


def _fused_adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    import_deepspeed(parameters[0].device.type)
    from deepspeed.ops.adam import FusedAdam

    made: torch.optim.Optimizer = FusedAdam(parameters, adam_w_mode=True, **ARGUMENTS)
    return made


@dataclass(frozen=True)
class Row:
    """One implementation on one layout.

    Attributes:
        device: "cuda" or "cpu".
        seconds: median of a step.
        difference: largest, of a weight after 3 steps, to torch's for-loop, in units of the learning rate.
    """

    stage: Stage
    device: str
    layout: str
    implementation: str
    num_parameters: int
    seconds: float
    difference: float


def run(
    out: Path, *, size: Size, stages: Sequence[Stage], num_repeats: int, names: Sequence[str] = ()
) -> None:
    """Measures all that can be built here; writes OUT/optimizer.json and OUT/optimizer.md, prints the latter.

    Args:
        size: of the networks.
        stages: which networks.
        num_repeats: steps of each implementation, one a turn, after one that is not counted.
        names: beginnings of the names of implementations; none for all.

    Raises:
        ConfigError: no implementation begins so.
    """
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    missing: dict[str, str] = {}
    rows: list[Row] = []
    for device_type in devices:
        chosen = {
            name: make
            for name, make in contenders(device_type).items()
            if not names or name.startswith(tuple(names))
        }
        differences = dict(_checked(chosen, device_type, missing))
        for stage in stages:
            for layout in LAYOUTS:
                found = _measure(stage, size, layout, device_type, chosen, set(differences), num_repeats)
                for name, (num_values, seconds) in found.items():
                    rows.append(Row(stage, device_type, layout, name, num_values, seconds, differences[name]))
    if not rows:
        raise ConfigError(f"--contender {' '.join(names)}: no implementation begins so")
    only = f" --contender {' '.join(map(repr, names))}" if names else ""
    record = Record.now(
        "optimizer",
        device=" and ".join(map(device_name, devices)),
        command=f"kandinsky-dist bench optimizer OUT --size {size} --stage {' '.join(stages)} "
        f"--repeats {num_repeats}{only}",
        setting={
            "size": size,
            "num_repeats": num_repeats,
            "num_threads": torch.get_num_threads(),
            "missing": missing,
        },
        rows=[asdict(row) for row in rows],
    )
    out.mkdir(parents=True, exist_ok=True)
    record.save(out / "optimizer.json")
    (out / "optimizer.md").write_text(to_markdown(record), "utf-8")
    print(to_markdown(record), end="")


def _checked(
    chosen: dict[str, Make], device_type: str, missing: dict[str, str]
) -> Iterator[tuple[str, float]]:
    """Builds each implementation, and says how far from torch's for-loop it is on a few values."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUM_CHECKED_VALUES, generator=generator).to(device_type)
    gradients = [torch.randn(NUM_CHECKED_VALUES, generator=generator).to(device_type) for _ in range(3)]

    def after_steps(make: Make) -> Tensor:
        parameter = nn.Parameter(weights.clone())
        optimizer = make([parameter])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    expected = after_steps(contenders(device_type)[REFERENCE])
    for name, make in chosen.items():
        try:
            found = after_steps(make)
        except Exception as error:  # a compiler or a header is missing; what is said differs by cause
            missing[f"{name} on {device_type}"] = (str(error) or type(error).__name__).splitlines()[0]
            say(f"{name} cannot be built here, and is left out: {missing[f'{name} on {device_type}']}")
            continue
        yield name, (found - expected).abs().max().item() / ARGUMENTS["lr"]


def _measure(
    stage: Stage,
    size: Size,
    layout: str,
    device_type: str,
    chosen: dict[str, Make],
    built: set[str],
    num_repeats: int,
) -> dict[str, tuple[int, float]]:
    """Implementation -> values that it updates, and its median seconds."""
    with torch.device("meta"):
        shapes = [item.shape for item in build(stage, size).parameters() if item.requires_grad]
    if layout == "flat":
        shapes = [torch.Size([sum(shape.numel() for shape in shapes)])]
    parameters = [nn.Parameter(torch.full(shape, 0.01, device=device_type)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizers = {name: make(parameters) for name, make in chosen.items() if name in built}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(1 + num_repeats):  # the first one makes the moments
        for name, optimizer in optimizers.items():
            _synchronize(device_type)
            begin = time.perf_counter()
            optimizer.step()
            _synchronize(device_type)
            seconds[name].append(time.perf_counter() - begin)
    num_values = sum(parameter.numel() for parameter in parameters)
    return {name: (num_values, median(found[1:])) for name, found in seconds.items()}


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def to_markdown(record: Record) -> str:
    """The record as a page."""
    rows = [Row(**row) for row in record.rows]
    current = {
        (row.stage, row.device, row.layout): row.seconds for row in rows if row.implementation == CURRENT
    }

    def ratio(row: Row) -> str:
        base = current.get((row.stage, row.device, row.layout))
        return "-" if base is None else f"{row.seconds / base:.2f}"

    columns = (
        Column("network", lambda row: row.stage, is_number=False),
        Column("on", lambda row: row.device, is_number=False),
        Column("tensors", lambda row: row.layout, is_number=False),
        Column("implementation", lambda row: row.implementation, is_number=False),
        Column("ms a step", lambda row: f"{1e3 * row.seconds:.2f}"),
        Column(f"x {CURRENT}", ratio),
        Column("GB/s", lambda row: f"{row.num_parameters * BYTES_PER_VALUE / row.seconds / 1e9:.1f}"),
        Column("difference, rates", lambda row: f"{row.difference:.1e}"),
    )
    reading = """\
- **tensors**: one for each parameter, as ddp, fsdp2 and zero0 give them to the optimizer; *flat*, a single
  one, as zero1 to zero3 do.
- **on cpu** is what an offloaded optimizer (`ds_configs/zero2_offload.json`) does. One process has all
  threads here; on a node the ranks share them, and its memory's bandwidth.
- **GB/s** counts weight, gradient and both moments once, as AdamW must move them.
- **difference** is the largest of a weight after 3 steps to torch's for-loop, in units of the learning rate.
"""
    missing = "".join(
        f"- {name} could not be built: {reason}\n" for name, reason in record.setting["missing"].items()
    )
    return "\n".join(
        [
            "# AdamW by implementation\n",
            provenance(record) + "\n",
            f"Networks of `--size {record.setting['size']}`, {record.setting['num_threads']} threads on the "
            "CPU. The implementations take turns on the same weights and gradients; medians of "
            f"{record.setting['num_repeats']} steps.\n",
            table(columns, rows),
            "## How to read it\n",
            reading + missing,
        ]
    )
