"""The bench cases by name, and how each one's records become Markdown."""

from collections.abc import Callable
from pathlib import Path

from kandinsky_dist.bench import (
    checkpoint,
    comm_report,
    data_report,
    data_resume,
    draws_report,
    faults_report,
    forecast_report,
    memory_report,
    optimizer,
    performance,
    scaling_report,
    train_report,
)
from kandinsky_dist.bench.gpu import memory as memory_gpu
from kandinsky_dist.bench.gpu import report as gpu_report
from kandinsky_dist.bench.record import Record
from kandinsky_dist.errors import DataError

REPORTS: dict[str, Callable[[Record], str]] = {
    "memory": memory_report.to_markdown,
    "data": data_report.to_markdown,
    "data_resume": data_resume.to_markdown,
    "checkpoint": checkpoint.to_markdown,
    "comm": comm_report.to_markdown,
    "train": train_report.to_markdown,
    "scaling": scaling_report.to_markdown,
    "optimizer": optimizer.to_markdown,
    "draws": draws_report.to_markdown,
    "estimate": forecast_report.to_markdown,
    "faults": faults_report.to_markdown,
    "gpu": gpu_report.to_markdown,
    "memory_gpu": memory_gpu.to_markdown,
}


def to_markdown(path: Path) -> str:
    """A saved record as the page that its case renders; a folder of records as the page about performance.

    Raises:
        DataError: the file is no record, or of an unknown case.
    """
    if path.is_dir():
        return performance.to_markdown(path)
    record = Record.load(path)
    if record.case not in REPORTS:
        raise DataError(f"{path} is of case {record.case}; known cases: {', '.join(REPORTS)}")
    return REPORTS[record.case](record)
