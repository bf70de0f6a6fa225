"""A corpus of images and captions -> the same corpus of encoder outputs, by any number of processes.

They share nothing but the folder that is made: each takes one shard after another that nobody works on, and
whoever finds them all done writes the manifest. A process that is killed leaves its shard to the others.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kandinsky_dist.config.ranks import read_ranks
from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.cache_description import CACHE_NAME, CacheDescription, read_description
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing.index import names_below
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.manifest import MANIFEST_NAME, Manifest, row_of, write_manifest
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.shard_index import SIDECAR_SUFFIX
from kandinsky_dist.errors import DISK_FULL, ConfigError, DataError, DiskFullError, StoppedError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.models.load import pipeline_folder
from kandinsky_dist.objectives.encoders import encoder_settings
from kandinsky_dist.precompute.batches import ShardReader
from kandinsky_dist.precompute.claims import claimed, owner
from kandinsky_dist.precompute.describe import Request, describe
from kandinsky_dist.precompute.encoders import DecoderEncoders, Encoders, PriorEncoders
from kandinsky_dist.precompute.progress import Progress, summary
from kandinsky_dist.precompute.shard import ShardMaker, finished_index
from kandinsky_dist.runtime.disk import write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import device_of

WORK_NAME = ".precompute"
"""Folder for claims and unfinished shards, gone when all is done."""
BAD_SAMPLES_NAME = "bad_samples.jsonl"
POLL_SECONDS = 0.5
"""Between two looks at shards that other processes work on, when nothing else is left."""
COMPONENTS = {
    "prior": ("text_encoder", "tokenizer", "image_encoder", "image_processor"),
    "decoder": ("movq",),
}
CONDITIONING_COMPONENTS = ("image_encoder", "image_processor")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command asks for beside the configuration.

    Attributes:
        out: folder of the shards.
        dtype: "fp16" or "bf16", that outputs are kept in.
        flip: keep outputs of the mirrored images too.
        batch_size: images that are encoded at once.
    """

    out: Path
    dtype: str
    flip: bool
    batch_size: int


def precompute(config: Config, options: Options, stop: StopRequest) -> None:
    """Does this process's share of the work and returns when all shards and the manifest are there.

    Raises:
        ConfigError: `out` holds something else, or a setting cannot work.
        DataError: a shard cannot be read.
        StoppedError: a stop was requested; the same command continues.
    """
    try:
        _Precompute(config, options, stop).run()
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(
                f"no space left for {options.out} ({error.strerror}); free some and give the same command "
                "again"
            ) from error
        raise DataError(f"{error.filename or options.out}: {error.strerror or error}") from error


class _Precompute:
    def __init__(self, config: Config, options: Options, stop: StopRequest) -> None:
        self.config, self.options, self.stop = config, options, stop
        assert config.data.shards is not None
        ranks = read_ranks(os.environ)
        self.is_shown = ranks.rank == 0
        self.device = device_of(ranks.local_rank)
        self.precision = config.parallel.precision
        if self.precision == "auto":
            self.precision = "bf16" if self.device.type == "cuda" else "fp32"
        if self.device.type == "cuda":
            torch.set_num_threads(1)  # of the threads that decode, each for itself
        self.out, self.work = options.out, options.out / WORK_NAME
        is_prior = config.stage == "prior"
        self.prior_folder = pipeline_folder(
            config.model.prior, "model.prior", COMPONENTS["prior"] if is_prior else CONDITIONING_COMPONENTS
        )
        self.decoder_folder = (
            None
            if is_prior
            else pipeline_folder(config.model.decoder, "model.decoder", COMPONENTS["decoder"])
        )
        self.manifest = read_manifest(config.data.shards)
        self.request = Request(
            encoder_settings(
                config, self.prior_folder, self.decoder_folder, aspect_buckets=config.data.aspect_buckets
            ),
            options.dtype,
            options.flip,
            self.precision,
            self.manifest.fingerprint,
        )
        counts = self.manifest.num_samples_S.tolist()
        names = names_below(config.data.shards, [_absolute(tar) for tar in self._tars()])
        self.tars = {shard: self.out / name for shard, name in enumerate(names) if counts[shard]}
        self.num_samples: list[int] = counts

    def run(self) -> None:
        self._check_out()
        if self._is_complete():
            say(f"precompute: {self.out} is already complete: kept")
            return
        with ThreadPoolExecutor(max(1, self.config.data.num_workers), thread_name_prefix="decode") as pool:
            encoders = self._encoders(self.precision)
            storage = make_storage(
                self.manifest,
                read_ahead_bytes=self.config.data.read_ahead_mib * MIB,
                cache_dir=None if self.config.data.cache_dir is None else Path(self.config.data.cache_dir),
                cache_bytes=int(self.config.data.cache_gib * GIB),
            )
            reader = ShardReader(
                self.manifest,
                storage,
                encoders.views,
                pool,
                batch_size=self.options.batch_size,
                aspect_buckets=self.config.data.aspect_buckets,
            )
            description = self._described(encoders, reader)
            maker = ShardMaker(reader, encoders, description, self.request.id, self.device, self._check_stop)
            self._make_all(maker)
        say(f"precompute: {summary(maker.spent)}")

    def _check_out(self) -> None:
        """Refuses a folder that holds something else than a part of what is asked for."""
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / CACHE_NAME).exists():
            self.request.check(read_description(str(self.out), "--out"), str(self.out))
        elif any(path.name != WORK_NAME for path in self.out.iterdir()):
            raise ConfigError(f"--out {self.out} holds something else: choose another folder or remove it")

    def _described(self, encoders: Encoders, reader: ShardReader) -> CacheDescription:
        """The description of the corpus, which the first process writes."""
        while not (self.out / CACHE_NAME).exists():
            with claimed(self.work / "description") as is_mine:
                if is_mine and not (self.out / CACHE_NAME).exists():
                    exact = encoders if self.precision == "fp32" else self._encoders("fp32")
                    found = describe(self.request, encoders, exact, reader, self.num_samples, self.device)
                    write_whole(self.out / CACHE_NAME, found.to_json())
            if not is_mine:
                self._wait()
        found = read_description(str(self.out), "--out")
        self.request.check(found, str(self.out))
        return found

    def _make_all(self, maker: ShardMaker) -> None:
        """Makes shards that nobody else makes until all are done, then the manifest unless it is there."""
        progress = Progress(sum(self.num_samples), self._num_done, is_shown=self.is_shown)
        left = self._in_turn()
        while not self._is_complete():
            num_left = len(left)
            left = [shard for shard in left if not self._is_made(shard, maker, progress)]
            if not left:
                self._finish()
            elif len(left) == num_left:
                self._wait()

    def _is_made(self, shard: int, maker: ShardMaker, progress: Progress) -> bool:
        """Makes a shard unless somebody else does or has; whether it is done now."""
        tar = self.tars[shard]
        self._check_stop()
        if finished_index(tar, self.request.id) is not None:
            return True
        with claimed(self.work / f"{shard:08d}") as is_mine:
            if not is_mine:
                return False
            if finished_index(tar, self.request.id) is None:
                row = self.manifest.shard(shard)
                order_bytes = row.num_bytes if row.order_bytes is None else row.order_bytes
                try:
                    maker.make(shard, tar, self.work / f"{shard:08d}.{owner()}.tar", order_bytes)
                except FileNotFoundError:
                    # Where locks do not hold, another machine may have made it too, and finished.
                    if not self._is_complete():
                        raise
        progress.update(maker.spent)
        return True

    def _finish(self) -> None:
        """Writes the list of damaged samples and, last, the manifest. For one process."""
        with claimed(self.work / "manifest") as is_mine:
            if not is_mine:
                self._wait()
                return
            if not self._is_complete():
                self._write_manifest()
        shutil.rmtree(self.work, ignore_errors=True)

    def _write_manifest(self) -> None:
        rows, damage = [], []
        for tar in self.tars.values():
            index = finished_index(tar, self.request.id)
            if index is None:
                raise DataError(f"{tar} was removed or changed meanwhile: give the command again")
            name = tar.relative_to(self.out).as_posix()
            rows.append(row_of(index, name, name + SIDECAR_SUFFIX))
            damage += [
                {"shard": name, "key": key, "reason": reason}
                for key, reason in json.loads(index.metadata["damage"])
            ]
        if len(damage) == sum(self.num_samples):
            raise DataError(f"none of {len(damage)} samples can be used, first {damage[0]['reason']}")
        write_whole(self.out / BAD_SAMPLES_NAME, "".join(json.dumps(item) + "\n" for item in damage))
        write_manifest(self.out, Manifest.of(self.out, rows))
        if damage:
            say(
                f"precompute: {len(damage)} of {sum(self.num_samples)} samples are damaged and have no "
                f"outputs, first {damage[0]['reason']}; they are in {self.out / BAD_SAMPLES_NAME}"
            )

    def _is_complete(self) -> bool:
        return (self.out / MANIFEST_NAME).exists() and (self.out / CACHE_NAME).exists()

    def _num_done(self) -> int:
        """Samples of the shards that are done."""
        return sum(
            self.num_samples[shard]
            for shard, tar in self.tars.items()
            if os.path.exists(f"{tar}{SIDECAR_SUFFIX}")
        )

    def _in_turn(self) -> list[int]:
        """All shards, from another one on for each process, so that they do not ask for the same ones."""
        shards = list(self.tars)
        first = zlib.crc32(owner().encode()) % len(shards)
        return shards[first:] + shards[:first]

    def _encoders(self, precision: str) -> Encoders:
        dtype, flip = PRECISIONS[precision], self.options.flip
        if self.decoder_folder is None:
            (captions,) = self.config.data.captions
            return PriorEncoders(self.prior_folder, captions, self.device, dtype, flip=flip)
        return DecoderEncoders(
            self.prior_folder,
            self.decoder_folder,
            self.config.data.resolution,
            self.device,
            dtype,
            flip=flip,
        )

    def _tars(self) -> Sequence[str]:
        return [self.manifest.tar(shard) for shard in range(len(self.manifest))]

    def _check_stop(self) -> None:
        if self.stop.is_made:
            raise StoppedError("stopped on request: the same command continues with the shards that are left")

    def _wait(self) -> None:
        self._check_stop()
        time.sleep(POLL_SECONDS)


def _absolute(tar: str) -> str:
    return tar if is_remote(tar) else os.path.abspath(tar)
