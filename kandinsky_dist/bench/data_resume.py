"""How long a run waits for its first batch, by the position where it goes on, in a corpus of any size.

The corpus is one shard of small pictures, named again and again by a manifest as long as that of a large
corpus: plan, look-ups, sidecars, reads and decoding are real, only the disk space is saved.
"""

import io
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from kandinsky_dist.bench.data_timing import in_new_process
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.render import Column, provenance, table
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.loader import Loader
from kandinsky_dist.data.locations import Texts
from kandinsky_dist.data.manifest import Manifest, write_manifest
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import DataError

SHARD_SAMPLES = 10_000
BATCH_SIZE = 256
NUM_LOOK_UPS = 100_000
PICTURE_SIZE = 64
TIMEOUT_SECONDS = 300.0
COLUMNS = [
    Column("first position", lambda row: f"{row['position']:,}"),
    Column("plan ready, s", lambda row: f"{row['plan_seconds']:.2f}"),
    Column("first batch, s", lambda row: f"{row['first_batch_seconds']:.2f}"),
    Column("from", lambda row: f"{min(row['repeats']):.2f}"),
    Column("to", lambda row: f"{max(row['repeats']):.2f}"),
    Column("a look-up, us", lambda row: f"{row['look_up_microseconds']:.2f}"),
    Column("memory, MiB", lambda row: f"{row['memory_bytes'] / 2**20:,.0f}"),
]


def run(out: Path, *, num_shards: int, num_repeats: int) -> Record:
    """Writes OUT/data_resume.json and OUT/data_resume.md.

    Args:
        out: folder of the record.
        num_shards: of the corpus, each of SHARD_SAMPLES.
        num_repeats: of each position, in turns, each in a new process.

    Raises:
        DataError: a process failed.
    """
    num_samples = num_shards * SHARD_SAMPLES
    positions = [0, num_samples // 10, num_samples - BATCH_SIZE // 2]
    found: dict[int, list[dict[str, float]]] = {position: [] for position in positions}
    with tempfile.TemporaryDirectory(prefix="kandinsky-dist-resume-") as folder:
        _write_corpus(Path(folder), num_shards)
        for _ in range(num_repeats):
            for position in positions:
                result = in_new_process(first_batch, folder, position, timeout_seconds=TIMEOUT_SECONDS)
                if isinstance(result, RuntimeError):
                    raise DataError(f"position {position}: {result}")
                found[position].append(result)
    rows: list[dict[str, Any]] = [
        {
            "position": position,
            **{name: median(result[name] for result in results) for name in results[0]},
            "repeats": [result["first_batch_seconds"] for result in results],
        }
        for position, results in found.items()
    ]
    record = Record.now(
        "data_resume",
        device=device_name("cpu"),
        command=f"kandinsky-dist bench resume OUT --num-shards {num_shards} --repeats {num_repeats}",
        setting={"num_samples": num_samples, "num_shards": num_shards, "batch_size": BATCH_SIZE},
        rows=rows,
    )
    out.mkdir(parents=True, exist_ok=True)
    record.save(out / "data_resume.json")
    (out / "data_resume.md").write_text(to_markdown(record), "utf-8")
    return record


def first_batch(folder: str, position: int) -> dict[str, float]:
    """Opens the corpus and takes the batch at a position. For `in_new_process`."""
    memory_before = _peak_bytes()
    begin = time.perf_counter()
    manifest = read_manifest(folder)
    order = Order([manifest], seed=0)
    order.locate(np.arange(position, position + 1))
    planned = time.perf_counter()
    views = Views(clip_size=PICTURE_SIZE, resolution=None, tokenize=None, captions=None, seed=0)
    loader = Loader(
        ShardDataset(order, views, LocalStorage(manifest)),
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        num_workers=0,
        device="cpu",
    )
    steps = loader.steps(position)
    (batch,) = next(steps)
    arrived = time.perf_counter()
    steps.close()
    assert batch.positions_B.tolist() == list(range(position, position + BATCH_SIZE))
    order.locate(np.arange(position, position + NUM_LOOK_UPS))
    return {
        "plan_seconds": planned - begin,
        "first_batch_seconds": arrived - begin,
        "look_up_microseconds": 1e6 * (time.perf_counter() - arrived) / NUM_LOOK_UPS,
        "memory_bytes": _peak_bytes() - memory_before,
    }


def to_markdown(record: Record) -> str:
    """The record as a page."""
    setting = record.setting
    how = (
        f"{setting['num_samples']:,} samples in {setting['num_shards']:,} shards, all of them the same tar: "
        "the manifest is as long as that of such a corpus. Each figure is from a process of its own, from "
        f"opening the manifest to the first batch of {setting['batch_size']} decoded pictures; medians. "
        "Memory is what the process's peak grew by.\n"
    )
    return "\n".join(
        ["# Resuming far into a large corpus\n", provenance(record) + "\n", how, table(COLUMNS, record.rows)]
    )


def _write_corpus(folder: Path, num_shards: int) -> None:
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((PICTURE_SIZE, PICTURE_SIZE)).convert("RGB").save(picture, "JPEG")
    content = {"jpg": picture.getvalue(), "txt": b"a gradient"}
    samples = ({"__key__": f"{number:05d}", **content} for number in range(SHARD_SAMPLES))
    one = write_shards(samples, folder / "one", samples_per_shard=SHARD_SAMPLES, origin={})
    every = np.zeros(num_shards, np.int64)
    write_manifest(
        folder,
        Manifest(
            str(folder),
            Texts.of([f"one/{one.tars[0]}"] * num_shards),
            Texts.of([f"one/{one.sidecars[0]}"] * num_shards),
            one.num_samples_S[every],
            one.num_bytes_S[every],
            one.fingerprints_SF[every],
            one.aspect_counts_SA[every],
        ),
    )


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
