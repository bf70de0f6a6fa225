"""One case of `bench train` or `bench scaling`: what is trained how, and the row that its turns become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from kandinsky_dist.config.loader import Layer, Resolved, load
from kandinsky_dist.config.resolve import check
from kandinsky_dist.config.schema import Config, Stage

Way = Literal["ours", "incumbent"]
NEVER = str(10**9)

# The work is the training: nothing is saved, and the host reads scalars when a turn is over.
WITHOUT_THE_REST = {
    "run.resume": "never",
    "run.max_steps": NEVER,
    "checkpoint.every_steps": NEVER,
    "telemetry.log_every_steps": NEVER,
    "telemetry.report_to": "[]",
}
# Guidance dropout shortens captions: both sides are to see the same ones.
WITHOUT_DROPOUT: dict[Stage, dict[str, str]] = {
    "prior": {"data.caption_dropout": "0"},
    "decoder": {"data.image_embedding_dropout": "0"},
}

COUNTED = ("gflop_per_sample", "tflops_per_second", "mfu")
"""Figures that rest on counted FLOPs, where these are known."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train one network.

    Attributes:
        name: of its row.
        stage: the network.
        way: ours, or the incumbent's.
        common: settings that it shares with what it is compared with, places of data and models included.
        settings: its own, which win.
        without: levers of `bench.switches` that are off, for what no setting of a run turns off.
        added_to: name of the case that `settings` go beyond; the next rung of a ladder names the last.
        is_beside: whether no other case is added to it: a lever that was tried and not kept.
        world_size: ranks.
        is_on_cpu: whether GPUs are left alone, for the sake of cases with more ranks than there are.
        more: columns of the row, such as the kind of scaling.
    """

    name: str
    stage: Stage
    way: Way = "ours"
    common: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    added_to: str | None = None
    is_beside: bool = False
    world_size: int = 1
    is_on_cpu: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self, more: Mapping[str, str] | None = None) -> Resolved:
        """Its configuration.

        Raises:
            ConfigError: it cannot work.
        """
        values = {**WITHOUT_THE_REST, **WITHOUT_DROPOUT[self.stage], **self.common, **self.settings}
        resolved = load(self.stage, None, [Layer(f"bench case {self.name}", {**values, **(more or {})})])
        check(resolved, world_size=self.world_size)
        return resolved

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.resolved().config


def row_of(case: Case, facts: Mapping[str, Any], repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A case's figures: medians over its repeats, and every repeat's seconds.

    Args:
        case: the case.
        facts: what it said of itself when it was built.
        repeats: `merged` results of its turns of kind train, with the `baseline_seconds` of the same round.
    """
    config = case.config
    samples = config.data.global_batch_size
    seconds = [repeat["step_seconds"] for repeat in repeats]
    row: dict[str, Any] = {
        "stage": case.stage,
        "case": case.name,
        "way": case.way,
        "added_to": case.added_to,
        "is_beside": case.is_beside,
        "settings": dict(case.settings),
        "without": list(case.without),
        "world_size": case.world_size,
        **case.more,
        "strategy": config.parallel.strategy,
        "global_batch_size": samples,
        "micro_batch_size": config.data.micro_batch_size,
        **facts,
        "step_seconds": seconds,
        "baseline_seconds": [repeat["baseline_seconds"] for repeat in repeats],
    }
    if seconds:
        row["samples_per_second"] = samples / median(seconds)
        row["first_loss"] = repeats[0].get("first_loss")
        row["parts"] = {
            name: median(repeat["parts"][name] for repeat in repeats) for name in repeats[0]["parts"]
        }
        row["peak_memory_gib"] = max(repeat["peak_memory_gib"] for repeat in repeats)
        for name in COUNTED:
            found = [repeat[name] for repeat in repeats if repeat.get(name) is not None]
            row[name] = median(found) if found else None
    return row


def merged(results: Sequence[Mapping[str, Any]], num_steps: int) -> dict[str, Any]:
    """Ranks' results of one turn as one: the slowest rank's time and parts, by step.

    The loss is the mean over ranks, memory the fullest rank's; rank 0 alone counts FLOPs.
    """
    slowest = max(results, key=lambda result: result["step_seconds"])
    found: dict[str, Any] = {
        **slowest,
        "parts": {name: seconds / num_steps for name, seconds in slowest["parts"].items()},
        "peak_memory_gib": max(result["peak_memory_gib"] for result in results),
    }
    for name in COUNTED:
        found[name] = results[0].get(name)
    losses = [result["first_loss"] for result in results if "first_loss" in result]
    if losses:
        found["first_loss"] = sum(losses) / len(losses)
    return found
