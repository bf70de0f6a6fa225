"""`data check`: what a corpus consists of, and whether it can be read by the code that trains on it.

Letters of shapes: S shards, R samples that are read.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm

from kandinsky_dist.data.captions import Captions, CaptionSource
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.checking.report_figures import NUM_NAMED, Report
from kandinsky_dist.data.checking.report_text import tables_of, to_markdown
from kandinsky_dist.data.checking.statistics import Histogram, repeats
from kandinsky_dist.data.checking.survey import Findings, Scope, Surveyor
from kandinsky_dist.data.decode import Wanted
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.errors import ConfigError, DataError
from kandinsky_dist.runtime.disk import write_whole

NUM_READ = 1000
CLIP_SIZE = 224
MAX_COMPARED = 2**24
"""Of more samples only some kinds of content are compared: these take 128 MiB."""
MAX_CHUNK = 64
"""Shards that are handed to a process at a time."""
READS_PER_PROCESS = 256
"""A process costs seconds to start: fewer decoded samples than this are not worth one."""
SHARDS_PER_PROCESS = 1024

CountTokens = Callable[[Sequence[str]], Sequence[int]]
Task = tuple[int, list[tuple[list[int], int]]]
"""First of some successive shards; for each, which samples to read, and its first sample's number."""


def check_shards(
    shards: str,
    *,
    num_read: int | None = NUM_READ,
    resolution: int = 512,
    captions: Sequence[str] = ("txt",),
    count_tokens: CountTokens | None = None,
    num_processes: int = min(16, os.cpu_count() or 1),
    out: Path | None = None,
    progress: bool = True,
) -> Report:
    """Looks at a corpus: at the index of every sample, and at the bytes of an even subset.

    Args:
        shards: as data.shards.
        num_read: samples that are read and decoded, evenly spread over the corpus; None for all.
        resolution: side of the decoder's view, pixels.
        captions: as data.captions.
        count_tokens: numbers of tokens of captions, start and end token included.
        num_processes: that read side by side, and that an epoch is estimated for.
        out: folder for report.json, report.md, report.png and, of samples that cannot be used,
            unreadable.jsonl.
        progress: show a bar on stderr when that is a terminal.

    Raises:
        ConfigError: a number that makes no sense, or no matplotlib for the picture.
        DataError: no such corpus. What is damaged in it is no error but `Report.problem`.
    """
    for name, value in (("num_processes", num_processes), ("resolution", resolution)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if num_read is not None and num_read < 0:
        raise ConfigError(f"sample={num_read} must be at least 0")
    if out is not None:
        from kandinsky_dist.data.checking.report_picture import require_matplotlib

        require_matplotlib()  # an hour later would be late
    manifest = read_manifest(shards, key="shards")
    num_read = manifest.num_samples if num_read is None else min(num_read, manifest.num_samples)
    report = Report(
        shards=shards,
        num_samples=manifest.num_samples,
        num_shards=len(manifest),
        num_bytes=int(manifest.num_bytes_S.sum()),
        fingerprint=manifest.fingerprint,
        resolution=resolution,
        num_processes=num_processes,
        one_in=-(-manifest.num_samples // MAX_COMPARED),
        tokens=Histogram() if count_tokens is not None else None,
    )
    scope = Scope(
        Wanted(CLIP_SIZE, (resolution, resolution)),
        Captions(tuple(CaptionSource.parse(text) for text in captions), 0),
        report.one_in,
        count_tokens is not None,
    )
    with ExitStack() as stack:
        log = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(out / "unreadable.jsonl", "w", encoding="utf-8"))
        bar = stack.enter_context(
            tqdm(total=len(manifest), desc="check", unit="shard", disable=None if progress else True)
        )
        for num_shards, findings in _surveyed(manifest, scope, num_read, num_processes):
            _add(report, findings, count_tokens, log)
            bar.update(num_shards)
    found = report.findings
    report.images, report.captions = repeats(found.image_prints), repeats(found.caption_prints)
    if out is not None:
        _write(out, report)
    return report


def _add(report: Report, findings: Findings, count_tokens: CountTokens | None, log: TextIO | None) -> None:
    for sample in findings.unreadable:
        report.reasons[sample.reason] += 1
        first = report.first.setdefault(sample.reason, [])
        if len(first) < NUM_NAMED:
            first.append(sample)
        if log is not None:
            log.write(json.dumps(asdict(sample)) + "\n")
    if count_tokens is not None and report.tokens is not None and findings.read_captions:
        report.tokens.add(count_tokens(findings.read_captions))
    findings.unreadable, findings.read_captions = [], []  # there may be very many
    report.findings.merge(findings)


def _write(out: Path, report: Report) -> None:
    from kandinsky_dist.data.checking.report_picture import draw

    figures = report.figures()
    write_whole(out / "report.json", json.dumps(figures, indent=1) + "\n")
    write_whole(out / "report.md", to_markdown(f"Corpus {report.shards}", tables_of(figures)))
    title = f"{report.shards}: {report.num_samples:,} samples in {report.num_shards:,} shards"
    write_whole(out / "report.png", draw(title, report.findings, report.tokens, report.resolution))


def _surveyed(
    manifest: Manifest, scope: Scope, num_read: int, num_processes: int
) -> Iterator[tuple[int, Findings]]:
    """Findings of all shards, some shards at a time and in their order, with the number of these."""
    num_processes = min(
        num_processes, max(num_read // READS_PER_PROCESS, len(manifest) // SHARDS_PER_PROCESS)
    )
    chunk = max(1, min(MAX_CHUNK, len(manifest) // (8 * max(1, num_processes))))
    tasks = _tasks(manifest, num_read, chunk)
    if num_processes <= 1:
        num_threads = torch.get_num_threads()
        try:
            _begin(manifest, scope)
            for task in tasks:
                yield len(task[1]), _survey_here(task)
        finally:
            torch.set_num_threads(num_threads)
        return
    # spawn: the caller may have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_begin, initargs=(manifest, scope)
    ) as pool:
        try:
            sizes = (min(chunk, len(manifest) - first) for first in range(0, len(manifest), chunk))
            yield from zip(sizes, pool.map(_survey_here, tasks), strict=True)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that read samples was ended from outside, perhaps for lack of memory; "
                "give fewer with --num-processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _tasks(manifest: Manifest, num_read: int, chunk: int) -> Iterator[Task]:
    """Successive shards, and which samples of them are read: evenly many of the corpus."""
    ends_S = manifest.selected_ends_S
    starts_S = ends_S - manifest.num_samples_S
    # In the middle of equal parts. In integers: there may be more samples than a float can number.
    positions_R = (2 * np.arange(num_read, dtype=np.int64) + 1) * manifest.num_samples // max(1, 2 * num_read)
    for first in range(0, len(manifest), chunk):
        task = []
        for shard in range(first, min(first + chunk, len(manifest))):
            start, end = np.searchsorted(positions_R, (starts_S[shard], ends_S[shard]))
            task.append(((positions_R[start:end] - starts_S[shard]).tolist(), int(starts_S[shard])))
        yield first, task


_surveyor: Surveyor
"""Of this process."""


def _begin(manifest: Manifest, scope: Scope) -> None:
    global _surveyor
    torch.set_num_threads(1)  # as training's readers have it: what is measured is a process on one core
    _surveyor = Surveyor(manifest, scope)


def _survey_here(task: Task) -> Findings:
    findings = Findings()
    for shard, (indices, first_position) in enumerate(task[1], task[0]):
        findings.merge(_surveyor.survey(shard, indices, first_position))
    return findings
