"""How fast samples come: this project's loaders beside others and beside the limits, on the same samples."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from kandinsky_dist.bench.data_contenders import FORMS, OWN, Contender, Form
from kandinsky_dist.bench.data_report import to_markdown
from kandinsky_dist.bench.data_rivals import RIVALS
from kandinsky_dist.bench.data_timing import Timing, in_new_process, measure
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.errors import ConfigError

CASE = "data"
CONTENDERS = (*OWN, *RIVALS)
BATCH_SIZES: dict[Form, int] = {"cached": 256, "jpeg": 32}
TIMEOUT_SECONDS = 600.0
PACKAGES = ("simplejpeg", "webdataset", "mosaicml-streaming", "litdata", "megatron-energon")


def run(
    out: Path,
    *,
    forms: Sequence[Form] = FORMS,
    num_samples: dict[Form, int],
    num_repeats: int,
    seconds: float,
    names: Sequence[str] = (),
) -> Record:
    """Writes OUT/data.json and OUT/data.md.

    Every repeat of every contender is a process of its own. All contenders have their first repeat before any
    has its second, so that a machine that slows down does so for all. Files are in the page cache.

    Args:
        out: folder of the record.
        forms: of samples.
        num_samples: of each form's corpus.
        num_repeats: of which the median counts.
        seconds: that each repeat counts samples for.
        names: contenders whose names begin with one of these; all if empty.

    Raises:
        ConfigError: no contender has such a name.
    """
    chosen = [
        contender
        for contender in CONTENDERS
        if contender.form in forms and (not names or contender.name.startswith(tuple(names)))
    ]
    if not chosen:
        known = ", ".join(dict.fromkeys(contender.name for contender in CONTENDERS))
        raise ConfigError(f"no contender is named {', '.join(names)}; there are: {known}")
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".data.", dir=out))
    try:
        rows = _rows(chosen, work, num_samples, num_repeats, seconds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    command = (
        f"kandinsky-dist bench data OUT --form {' '.join(forms)} --repeats {num_repeats} "
        f"--seconds {seconds:g} " + " ".join(f"--num-samples-{form} {num_samples[form]}" for form in forms)
    )
    setting = {
        "batch_sizes": BATCH_SIZES,
        "num_samples": num_samples,
        "num_repeats": num_repeats,
        "seconds": seconds,
    }
    record = Record.now(
        CASE,
        device=device_name("cpu"),
        command=command,
        setting=setting,
        rows=rows,
        packages=PACKAGES,
    )
    record.save(out / "data.json")
    (out / "data.md").write_text(to_markdown(record), "utf-8")
    return record


def _rows(
    contenders: Sequence[Contender],
    work: Path,
    num_samples: dict[Form, int],
    num_repeats: int,
    seconds: float,
) -> list[dict[str, Any]]:
    failures: dict[str, str] = {}
    for layout in {contender.layout.name: contender.layout for contender in contenders}.values():
        if not all(contender.is_installed() for contender in contenders if contender.layout == layout):
            failures[layout.name] = "not installed"
            continue
        result = in_new_process(
            layout.write, work / layout.name, num_samples[layout.form], timeout_seconds=TIMEOUT_SECONDS
        )
        if isinstance(result, RuntimeError):
            failures[layout.name] = str(result)
    cases = [(contender, workers) for contender in contenders for workers in contender.workers]
    timings: dict[int, list[Timing]] = {number: [] for number in range(len(cases))}
    notes: dict[int, str] = {}
    bar = tqdm(total=num_repeats * len(cases), desc="bench data", unit="run", disable=None)
    for _ in range(num_repeats):
        for number, (contender, workers) in enumerate(cases):
            bar.update()
            failure = failures.get(contender.layout.name)
            result = RuntimeError(failure)
            if failure is None:
                result = in_new_process(
                    measure,
                    contender.form,
                    contender.batches,
                    work / contender.layout.name,
                    BATCH_SIZES[contender.form],
                    workers,
                    seconds,
                    timeout_seconds=TIMEOUT_SECONDS,
                )
            if isinstance(result, Timing):
                timings[number].append(result)
            else:
                notes[number] = str(result)
    bar.close()
    return [
        {
            "form": contender.form,
            "contender": contender.name,
            "num_workers": workers,
            "samples_per_second": median([timing.samples_per_second for timing in timings[number]] or [0.0]),
            "busy_cores": median([timing.busy_cores for timing in timings[number]] or [0.0]),
            "repeats": [timing.samples_per_second for timing in timings[number]],
            "note": notes.get(number, ""),
            "install": contender.install,
        }
        for number, (contender, workers) in enumerate(cases)
    ]
