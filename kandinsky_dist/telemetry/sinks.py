"""Where metrics go: JSON lines that survive a kill, and TensorBoard.

Only rank 0 opens metric sinks; each rank has its own audit log. Write one entry a step: where a step has
several, because the run was restarted from before it, the last one counts.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kandinsky_dist.errors import DISK_FULL, ConfigError, DataError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Sink(Protocol):
    """Takes log entries of host numbers; an entry always has the key "step"."""

    def write(self, entry: Mapping[str, float | int]) -> None:
        """Records one entry."""

    def close(self) -> None:
        """Makes everything written so far durable; nothing may be written afterwards."""


class _LineFile:
    """An appended file of JSON objects that never has half a line in its middle."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is one write to the kernel, so a killed process leaves it whole or not at all.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        _cut_torn_line(path)

    def append(self, value: Mapping[str, Any]) -> None:
        line = (json.dumps(value, allow_nan=False) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        with _naming(self._file.name):
            if self._file.write(line) != len(line):  # the disk is full
                self._file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


class JsonLines:
    """metrics.jsonl: one object a line. A number that is not finite is written as null, as JSON has none."""

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def write(self, entry: Mapping[str, float | int]) -> None:
        """Appends one line, which is on its way to the disk when this returns."""
        self._lines.append({key: value if math.isfinite(value) else None for key, value in entry.items()})

    def close(self) -> None:
        """Waits until the lines are on the disk."""
        self._lines.close()


class BadSampleLog:
    """bad_samples.jsonl: each damaged sample, why it cannot be used and what was trained on in its place."""

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._lines.append({"step": step, **entry})

    def close(self) -> None:
        """Waits until the lines are on the disk."""
        self._lines.close()


class AuditLog:
    """audit/rank_*.jsonl: the keys of the samples that this rank trained on, one object a step."""

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def write(self, step: int, keys: Sequence[str]) -> None:
        """Appends one line."""
        self._lines.append({"step": step, "keys": list(keys)})

    def close(self) -> None:
        """Waits until the lines are on the disk."""
        self._lines.close()


def cut_audits(folder: Path, world_size: int, step: int) -> None:
    """Takes what comes after a step out of the audit logs of ranks that there are no more.

    A killed run continues from before its last step. With fewer ranks nobody would write those steps of the
    others again, and the samples would be in two ranks' logs.
    """
    for path in folder.glob("rank_*.jsonl"):
        if int(path.stem.removeprefix("rank_")) >= world_size:
            entries = read_metrics(path)
            kept = [entry for entry in entries if entry["step"] <= step]
            if len(kept) < len(entries):
                text = "".join(json.dumps(entry) + "\n" for entry in kept)
                part = path.with_suffix(".part")
                with _naming(part):
                    part.write_text(text)
                    part.replace(path)


class TensorBoard:
    """Event files, a tag a key, with `entry["step"]` as the step axis."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._last_step = -1

    def write(self, entry: Mapping[str, float | int]) -> None:
        """Records every number of the entry under its key."""
        step = int(entry["step"])
        if step <= self._last_step:  # the run has gone back
            self.close()
            self._writer = None
        self._last_step = step
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used

            # purge_step hides what an earlier start logged from this step on: the last entry counts here too.
            _hush_writer_threads()
            with _naming(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=step)
        with _naming(self._folder):
            for key, value in entry.items():
                if key != "step":
                    self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes the event file."""
        if self._writer is not None:
            with _naming(self._folder):
                self._writer.close()


def open_sinks(run_dir: Path, report_to: Sequence[str]) -> list[Sink]:
    """Opens metrics.jsonl and the sinks that `telemetry.report_to` names. Call on rank 0 only.

    Raises:
        ConfigError: a name that is no sink.
    """
    unknown = sorted(set(report_to) - {"tensorboard"})
    if unknown:
        raise ConfigError(f"telemetry.report_to={','.join(unknown)} is not a sink; there is: tensorboard")
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
    if "tensorboard" in report_to:
        sinks.append(TensorBoard(run_dir / "tensorboard"))
    return sinks


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Entries of a metrics or audit file, the last one of each step, by rising step.

    A last line that a kill cut short is left out. A null reads as nan.

    Raises:
        DataError: a line other than the last is not an entry.
    """
    entries: dict[int, dict[str, Any]] = {}
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is not an entry with a step ({error!r}): delete that line to read the rest"
            ) from error
        entries[step] = {key: math.nan if value is None else value for key, value in entry.items()}
    return [entries[step] for step in sorted(entries)]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Adds the path to a system error that has none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _hush_writer_threads() -> None:
    """Spares people the traceback of TensorBoard's writer thread: the next entry raises the same error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_told = isinstance(arguments.exc_value, OSError) and arguments.exc_value.errno in DISK_FULL
        if not (is_told and type(arguments.thread).__module__.startswith("tensorboard.")):
            before(arguments)

    threading.excepthook = hook


def _cut_torn_line(path: Path) -> None:
    """Removes what follows the last line end, so that the next line starts on its own."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:  # from the back, in blocks: a long run's file is not read whole
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != end:
            file.truncate(keep)
