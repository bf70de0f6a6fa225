"""Steps of several ranks that were measured, beside what the model of time says from one rank's."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kandinsky_dist.bench.forecast_inputs import links_of
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.workload import build
from kandinsky_dist.config.schema import ParallelConfig, Stage
from kandinsky_dist.errors import DataError
from kandinsky_dist.estimate.links import Links
from kandinsky_dist.estimate.time import Traffic, step_time
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.models.blocks import blocks

Row = dict[str, Any]
REPLICATED = ("ddp", "zero0")
"""Strategies in which every rank updates every weight."""


def records_below(folder: Path, case: str) -> list[Record]:
    """All records of a bench case, wherever in the folder they are."""
    paths = sorted(folder.rglob("*.json"))
    return [Record.load(path) for path in paths if json.loads(path.read_text("utf-8")).get("case") == case]


PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Of a row, as torch calls its type -> as settings do."""


def measured_rows(scaling: Iterable[Record], comm: Sequence[Record]) -> list[Row]:
    """Rows of a record of `estimate`: every measured step of more than one rank, and its prediction.

    Args:
        scaling: of `bench scaling`.
        comm: of `bench comm`; the one of the same machine says what collectives take there.

    Raises:
        DataError: there is none of that machine.
    """
    rows = []
    for record in scaling:
        found = next((item for item in comm if item.device == record.device), None)
        if found is None:
            raise DataError(
                f"{record.command!r} was measured on {record.device}, and no record of bench comm was"
            )
        rows += predicted(record, links_of(found))
    return rows


def predicted(record: Record, links: Links) -> list[Row]:
    """Each row of a record of `bench scaling` with more than one rank, from the row with one."""
    rows = []
    for row in record.rows:
        alone = _alone(record, row)
        if row["world_size"] == 1 or alone is None or not row["step_seconds"]:
            continue
        rows.append(
            {
                "kind": "measured",
                "device": record.device,
                "stage": row["stage"],
                "strategy": row["strategy"],
                "mode": row["mode"],
                "num_ranks": row["world_size"],
                "measured_seconds": median(
                    row["reduced_seconds" if _is_beside(record, row) else "step_seconds"]
                ),
                "predicted_seconds": _seconds(record, row, alone, links),
            }
        )
    return rows


def _alone(record: Record, row: Row) -> Row | None:
    """What one rank took for the same."""
    keys = ("stage", "strategy", "mode", "micro_batch_size", "precision")
    for other in record.rows:
        is_like = all(other.get(key) == row.get(key) for key in keys)
        if other["world_size"] == 1 and is_like and other["step_seconds"]:
            return other
    return None


def _is_beside(record: Record, row: Row) -> bool:
    """Whether there are steps of as many ranks that left their gradients unreduced, on a CPU.

    Ranks with cores of their own share its memory all the same, which a rank alone has for itself. Such
    steps, and others with the exchange in turns with them, show what it adds.
    """
    return record.setting["device_type"] == "cpu" and bool(row.get("silent_seconds"))


def _seconds(record: Record, row: Row, alone: Row, links: Links) -> float:
    """The model's step.

    Where ranks share one CPU's cores, all their work is done by the same cores one after the other, and so is
    communication, which then hides behind nothing.

    Where the computing was measured with all ranks beside each other, the model only has to say what the
    exchange adds.
    """
    num_ranks, strategy = row["world_size"], row["strategy"]
    is_beside = _is_beside(record, row)
    computing = row if is_beside else alone
    update = computing["parts"]["optimizer"]
    working = median(computing["silent_seconds" if is_beside else "step_seconds"]) - update
    share = 1.0 if strategy in REPLICATED else 1.0 / num_ranks
    num_micro = row["global_batch_size"] // (row["micro_batch_size"] * num_ranks)
    num_micro_of_computing = computing["global_batch_size"] // (
        computing["micro_batch_size"] * computing["world_size"]
    )
    time = step_time(
        ParallelConfig(strategy=strategy),
        traffic(row["stage"], record.setting["size"], PRECISIONS[row["precision"]]),
        links,
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        num_micro=num_micro,
        micro_seconds=working / num_micro_of_computing,
    )
    if is_beside or not record.setting["shares_cores"]:
        return time.compute + time.exposed + update * share
    return num_ranks * (time.compute + update * share) + time.communication


@cache
def traffic(stage: Stage, size: Size, precision: str) -> Traffic:
    """What the strategies move of a network."""
    with torch.device("meta"):
        module = build(stage, size)
    units = [sum(item.numel() for item in unit.parameters()) for unit in blocks(module)]
    trained = sum(item.numel() for item in module.parameters() if item.requires_grad)
    return Traffic(trained, trained, (*units, trained - sum(units)), precision)
