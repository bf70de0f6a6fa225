"""The ladder: from the incumbent's way to this trainer, one lever a rung.

To add a lever, add a rung. Its settings go on top of those of the kept rungs below it. A rung whose setting,
switch or package is not there is left out, and the page says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported

from kandinsky_dist.bench.switches import is_there
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.config.loader import Layer, load
from kandinsky_dist.config.schema import KEYS, STAGES, Stage
from kandinsky_dist.errors import ConfigError

BASELINE = "the incumbent's way"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One lever.

    Attributes:
        name: of its row.
        settings: added to those of the kept rungs below; those of the other stage are passed over.
        brings: a lever of `bench.switches`, always on in training and taken from the rungs below.
        off: settings of the rungs below, for a lever that is on by default; unknown ones are passed over.
        stages: that it applies to.
        devices: where it is worth a try.
        kept_on: devices on which the rungs above stand on it; elsewhere it is tried once, beside the ladder.
        needs_bf16: a processor without it takes thirty times as long, and the other cases' turns with it.
        why: what it does, for the page; no figures.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    brings: str | None = None
    off: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = STAGES
    devices: tuple[str, ...] = ("cpu", "cuda")
    kept_on: tuple[str, ...] = ("cpu", "cuda")
    needs_bf16: bool = False
    why: str

    def missing(self) -> list[str]:
        """Settings and levers that this version does not have."""
        found = [f"{key}={value}" for key, value in self.settings.items() if not _is_known(key, value)]
        if self.brings is not None and not is_there(self.brings):
            found.append(self.brings)
        if self.needs_bf16 and not (_is_avx512_bf16_supported() or _is_amx_tile_supported()):
            found.append("bf16 in this processor")
        return found


def applies(key: str, stage: Stage) -> bool:
    """Whether a setting is one of this stage, as far as is known."""
    return key not in KEYS or KEYS[key].metadata["stage"] in (None, stage)


def _is_known(key: str, value: str) -> bool:
    try:
        load(STAGES[0], None, [Layer("ladder", {key: value})])
    except ConfigError:
        return False
    return True


RUNGS = (
    Rung(
        name="this trainer, decoding in the process",
        settings={"data.num_workers": "0"},
        why="fused AdamW, one loop without host reads, pictures decoded once for all views; encoders live",
    ),
    Rung(
        name="+ decoding ahead",
        settings={"data.num_workers": "2"},
        why="threads of another process decode the next steps' pictures while this one is computed",
    ),
    Rung(
        name="+ pad-free text",
        stages=("prior",),
        brings="pad-free text",
        why="captions are cut to the longest in the text encoder, and packed without padding in the prior",
    ),
    Rung(
        name="+ cached encoders",
        settings={"data.source": "cached"},
        why="what the frozen networks say of a sample is read from the shards; none of them is loaded",
    ),
    Rung(
        name="+ 4 noise draws a caption",
        settings={"objective.noise_draws": "4"},
        stages=("prior",),
        kept_on=(),
        why="draws share the text's part of the forward pass; more work a sample, for less variance",
    ),
    Rung(
        name="+ bf16",
        settings={"parallel.precision": "bf16"},
        devices=("cpu",),
        kept_on=(),
        needs_bf16=True,
        why="half the bytes, and products of bf16 itself",
    ),
    Rung(
        name="+ channels_last",
        settings={"parallel.channels_last": "true"},
        off={"parallel.channels_last": "false"},
        stages=("decoder",),
        kept_on=("cuda",),
        why="convolutions read their channels from neighbouring memory",
    ),
    Rung(
        name="+ compile",
        settings={"parallel.compile": "true"},
        why="torch.compile fuses the blocks' small operations",
    ),
    Rung(
        name="+ cuDNN attention",
        settings={"parallel.attention": "cudnn"},
        stages=("decoder",),
        devices=("cuda",),
        kept_on=(),
        why="cuDNN's fused kernels in place of those that torch chooses",
    ),
    Rung(
        name="+ float8",
        settings={"parallel.float8": "true"},
        stages=("prior",),
        devices=("cuda",),
        kept_on=(),
        why="matrices are multiplied in 8 bits; another arithmetic than the baseline's",
    ),
)


def _off(above: Sequence[Rung]) -> dict[str, str]:
    """Settings that keep the levers of the rungs above from being on already."""
    return {key: value for rung in above for key, value in rung.off.items() if _is_known(key, value)}


def cases(
    stages: Sequence[Stage], common: Mapping[Stage, Mapping[str, str]], device: str, world_size: int
) -> tuple[list[Case], list[str]]:
    """The baseline and every rung, stage by stage, and why some are left out.

    Args:
        stages: which ladders.
        common: settings of all of a stage's cases.
        device: "cpu" or "cuda".
        world_size: ranks of each case.

    Raises:
        ConfigError: the common settings cannot work.
    """
    found, left_out = [], list[str]()
    for stage in stages:
        shared: dict[str, Any] = {"stage": stage, "common": common[stage], "world_size": world_size}
        found.append(Case(name=BASELINE, way="incumbent", **shared))
        found[-1].resolved()  # what is wrong with the common settings is no reason to leave rungs out
        below, kept = BASELINE, dict[str, str]()
        rungs = [rung for rung in RUNGS if stage in rung.stages and device in rung.devices]
        for number, rung in enumerate(rungs):
            if missing := rung.missing():
                left_out.append(f"{stage}, {rung.name}: there is no {', '.join(missing)}")
                continue
            later = [other.brings for other in rungs[number + 1 :]]
            without = tuple(lever for lever in later if lever is not None and is_there(lever))
            mine = {key: value for key, value in rung.settings.items() if applies(key, stage)}
            settings = {**_off(rungs[number + 1 :]), **kept, **mine}
            case = Case(
                name=rung.name,
                settings=settings,
                without=without,
                added_to=below,
                is_beside=device not in rung.kept_on,
                more={"why": rung.why},
                **shared,
            )
            try:
                case.resolved()
            except ConfigError as error:  # a package that is missing, most likely
                left_out.append(f"{stage}, {rung.name}: {error}")
                continue
            found.append(case)
            if device in rung.kept_on:
                below, kept = rung.name, {**kept, **mine}
    return found, left_out
