"""What training is to reach on a kind of device, beside what records say of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, table
from kandinsky_dist.bench.train_report import Row, ratio

DEVICE_TYPES = {"cpu": "a CPU", "cuda": "a GPU"}


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What was promised of the fastest kept case of a kind: one of two figures.

    Attributes:
        device_type: of the record, "cpu" or "cuda".
        stage: network.
        is_cached: whether frozen encoders are out of the step.
        times: the incumbent's rate in the same arithmetic, at least.
        mfu: share of the GPU's published peak that the FLOPs really done reach, at least.
    """

    device_type: str
    stage: str
    is_cached: bool
    times: float | None = None
    mfu: float | None = None

    @property
    def text(self) -> str:
        """What is aimed at, in words."""
        return f"{self.times:g} times the incumbent" if self.mfu is None else f"{self.mfu:.0%} of the peak"

    def figure(self, row: Row, first: Row) -> float | None:
        """A case's figure; None if the case does not count, or has none.

        Args:
            row: the case.
            first: of its stage.
        """
        is_cached = row["settings"].get("data.source") == "cached"
        counts = row["way"] == "ours" and not row["is_beside"] and is_cached == self.is_cached
        if not counts:
            return None
        if self.mfu is not None:
            return row.get("mfu")
        has_rival = first["way"] == "incumbent" and row.get("precision") == first.get("precision")
        return ratio(row, first) if has_rival else None

    def said(self, figure: float) -> str:
        """A figure as it stands in the table."""
        return f"{figure:.2f}" if self.mfu is None else f"{figure:.1%}"

    def is_reached(self, figure: float) -> bool:
        """Whether a figure is what was promised."""
        least = self.times if self.mfu is None else self.mfu
        assert least is not None
        return figure >= least


AIMS = (
    Aim(device_type="cpu", stage="prior", is_cached=False, times=1.2),
    Aim(device_type="cpu", stage="prior", is_cached=True, times=10.0),
    Aim(device_type="cpu", stage="decoder", is_cached=True, times=2.0),
    Aim(device_type="cuda", stage="prior", is_cached=False, times=2.0),
    Aim(device_type="cuda", stage="prior", is_cached=True, times=15.0),
    Aim(device_type="cuda", stage="prior", is_cached=True, mfu=0.55),
    Aim(device_type="cuda", stage="decoder", is_cached=False, times=1.5),
    Aim(device_type="cuda", stage="decoder", is_cached=True, times=3.0),
    Aim(device_type="cuda", stage="decoder", is_cached=True, mfu=0.5),
)


@dataclass(frozen=True)
class _Line:
    """An aim beside the record that was looked at, if any, and what it says."""

    aim: Aim
    record: Record | None = None
    best: Row | None = None
    figure: float | None = None


def to_markdown(records: Sequence[Record]) -> str:
    """Each aim beside every record that can tell: one ladder has few turns, two cases alone may have many.

    An aim on a kind of device that no record is of is listed as such.
    """
    lines = [line for record in records for line in _of_record(record)]
    measured = {record.setting["device_type"] for record in records}
    lines += [_Line(aim) for aim in AIMS if aim.device_type not in measured]
    columns = [
        Column("device", _device, is_number=False),
        Column("stage", lambda line: line.aim.stage, is_number=False),
        Column("encoders", lambda line: "cached" if line.aim.is_cached else "live", is_number=False),
        Column("aim, at least", lambda line: line.aim.text, is_number=False),
        Column("measured", lambda line: "-" if line.figure is None else line.aim.said(line.figure)),
        Column("turns", lambda line: str(line.record.setting["num_repeats"]) if line.record else "-"),
        Column("by", _case, is_number=False),
        Column("reached", _verdict, is_number=False),
    ]
    return table(columns, lines)


def _of_record(record: Record) -> list[_Line]:
    lines = []
    for aim in AIMS:
        rows = [row for row in record.rows if row["stage"] == aim.stage]
        if aim.device_type != record.setting["device_type"] or not rows:
            continue
        found = [(figure, row) for row in rows if (figure := aim.figure(row, rows[0])) is not None]
        figure, best = max(found, key=lambda pair: pair[0], default=(None, None))
        if best is not None or record.setting["has_ladder"]:
            lines.append(_Line(aim, record, best, figure))
    return lines


def _device(line: _Line) -> str:
    return line.record.device if line.record else DEVICE_TYPES[line.aim.device_type]


def _case(line: _Line) -> str:
    if line.record is None:
        return "no record yet"
    return line.best["case"] if line.best else "not measured"


def _verdict(line: _Line) -> str:
    if line.figure is None:
        return "-"
    return "yes" if line.aim.is_reached(line.figure) else "no"
