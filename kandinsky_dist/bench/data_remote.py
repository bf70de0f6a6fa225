"""The training loader on shards over the network, beside itself on the same shards from a local disk."""

import time
from functools import partial
from pathlib import Path
from statistics import median

from kandinsky_dist.bench.data_contenders import Batches, training_batches
from kandinsky_dist.bench.data_report import to_markdown
from kandinsky_dist.bench.data_timing import Timing, in_new_process, measure
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.remote.fetch import Fetcher
from kandinsky_dist.errors import DataError

NUM_PINGS = 5
TIMEOUT_SECONDS = 600.0
MIB = 2**20


def run(
    out: Path,
    *,
    local: str,
    remote: str,
    num_repeats: int,
    seconds: float,
    batch_size: int,
    num_workers: int,
    read_ahead_mib: int,
) -> Record:
    """Writes OUT/data_remote.json and OUT/data_remote.md.

    Args:
        out: folder of the record.
        local: shard folder.
        remote: URL of the same shards, with their manifest and sidecars.
        num_repeats: of each, in turns.
        seconds: that each repeat counts samples for.
        batch_size: samples a batch.
        num_workers: decoding threads.
        read_ahead_mib: as data.read_ahead_mib.

    Raises:
        DataError: the two are not the same samples, or one cannot be read.
    """
    manifests = {"local": read_manifest(local), "remote": read_manifest(remote)}
    if manifests["local"].fingerprint != manifests["remote"].fingerprint:
        raise DataError(f"{local} and {remote} are not the same shards; copy one from the other")
    places = {"local": local, "remote": remote}
    batches = partial(_batches, read_ahead_mib * MIB)
    timings: dict[str, list[Timing]] = {name: [] for name in places}
    for _ in range(num_repeats):
        for name, location in places.items():
            result = in_new_process(
                measure, "jpeg", batches, location, batch_size, num_workers, seconds,
                timeout_seconds=TIMEOUT_SECONDS,
            )  # fmt: skip
            if isinstance(result, RuntimeError):
                raise DataError(f"{location}: {result}")
            timings[name].append(result)
    rows = [
        {
            "form": "remote",
            "contender": name,
            "num_workers": num_workers,
            "samples_per_second": median(timing.samples_per_second for timing in found),
            "busy_cores": median(timing.busy_cores for timing in found),
            "repeats": [timing.samples_per_second for timing in found],
            "note": "",
            "install": "",
        }
        for name, found in timings.items()
    ]
    setting = {
        "batch_sizes": {"jpeg": batch_size},
        "num_samples": {"jpeg": manifests["local"].num_samples},
        "num_repeats": num_repeats,
        "seconds": seconds,
        "read_ahead_mib": read_ahead_mib,
        "corpus_mib": round(int(manifests["local"].num_bytes_S.sum()) / MIB),
        "first_byte_ms": round(1000 * _first_byte_seconds(manifests["remote"].tar(0)), 1),
    }
    command = (
        f"kandinsky-dist bench remote OUT --local SHARDS --remote URL --repeats {num_repeats} "
        f"--seconds {seconds:g} --batch-size {batch_size} --num-workers {num_workers} "
        f"--read-ahead-mib {read_ahead_mib}"
    )
    record = Record.now(
        "data",
        device=device_name("cpu"),
        command=command,
        setting=setting,
        rows=rows,
        packages=("simplejpeg", "boto3"),
    )
    out.mkdir(parents=True, exist_ok=True)
    record.save(out / "data_remote.json")
    (out / "data_remote.md").write_text(to_markdown(record), "utf-8")
    return record


def _batches(read_ahead_bytes: int, location: str, batch_size: int, num_workers: int) -> Batches:
    return training_batches(location, batch_size, num_workers, read_ahead_bytes=read_ahead_bytes)


def _first_byte_seconds(location: str) -> float:
    """Median time of one request for one byte, over an open connection."""
    fetcher, found = Fetcher(), []
    for _ in range(NUM_PINGS + 1):
        start = time.perf_counter()
        fetcher.fetch(location, 0, 1)
        found.append(time.perf_counter() - start)
    return median(found[1:])
