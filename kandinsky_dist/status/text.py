"""A run's status for people, on a terminal, and for programs."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from kandinsky_dist.runtime.words import duration, rate
from kandinsky_dist.status.collect import Status, is_number

FIGURES = (
    ("loss", "loss", "{:.4g}".format),
    ("samples_per_second", "rate", rate),
    ("step_seconds", "step", "{:.3g} s".format),
    ("data_wait_fraction", "waits for data", "{:.0%}".format),
    ("mfu", "MFU", "{:.1%}".format),
    ("grad_norm", "gradient norm", "{:.3g}".format),
    ("peak_memory_gib", "peak memory", "{:.2f} GiB".format),
)


def lines(status: Status) -> Iterator[str]:
    """The dashboard, a line at a time."""
    state = status.state if not status.detail else f"{status.state}: {status.detail}"
    yield f"{status.run_dir}  {state}"
    if status.step is not None:
        share = f" ({status.step / status.max_steps:.1%})" if status.max_steps else ""
        eta = "" if status.eta_seconds is None else f", ETA {duration(status.eta_seconds)}"
        yield f"  step          {status.step:,} of {status.max_steps or '?'}{share}{eta}"
    parts = [
        f"{label} {words(status.figures[key])}"
        for key, label, words in FIGURES
        if is_number(status.figures.get(key))
    ]
    if parts:
        yield f"  figures       {', '.join(parts)} (step {status.figures['step']:,})"
    yield f"  checkpoint    {_checkpoint(status)}"
    yield (
        f"  so far        {_count(status.num_restarts, 'restart')}, "
        f"{_count(status.num_rollbacks, 'rollback')}, {_count(status.num_bad_samples, 'bad sample')}"
    )
    if status.stragglers:
        named = ", ".join(f"rank {rank} ({count} times)" for rank, count in status.stragglers.items())
        yield f"  stragglers    {named}"
    if status.world_size is not None and status.running_seconds is not None:
        job = f", job {status.job}" if status.job else ""
        yield (
            f"  ranks         {status.world_size}, the first on {status.host}{job}, "
            f"for {duration(status.running_seconds)}"
        )


def as_json(status: Status) -> str:
    """One object with the attributes of `Status`."""
    return json.dumps(asdict(status), indent=1)


def _checkpoint(status: Status) -> str:
    if status.last_checkpoint is None:
        text = "none yet"
    elif status.last_checkpoint_problem is None:
        text = f"{status.last_checkpoint}, whole by its files' sizes"
    else:
        text = f"{status.last_checkpoint} is damaged: {status.last_checkpoint_problem}"
    return text + (", another one is being written" if status.is_writing else "")


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
