"""What a corpus consists of: its manifest is read instead of the shards, whose number is not bounded.

Letters of shapes: S shards, A aspect buckets, N samples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from kandinsky_dist.data.aspects import ASPECTS, NUM_ASPECTS
from kandinsky_dist.data.locations import Texts, base_name, join
from kandinsky_dist.data.shard_index import ShardIndex, mapped, read_header
from kandinsky_dist.errors import DataError
from kandinsky_dist.runtime.disk import write_whole

MANIFEST_NAME = "manifest.safetensors"
MANIFEST_VERSION = "2"
FINGERPRINT_BYTES = 32


@dataclass(frozen=True)
class Shard:
    """One tar and its sidecar, each relative to the manifest's folder, absolute or a URL.

    Attributes:
        fingerprint: hexadecimal, that of `tarwalk.TarTable`.
        aspect_counts: samples in each aspect bucket.
        order_bytes: of the shard that it was made from, by which the order goes; None: of its own.
    """

    tar: str
    sidecar: str
    num_samples: int
    num_bytes: int
    fingerprint: str
    aspect_counts: tuple[int, ...]
    order_bytes: int | None = None


def row_of(index: ShardIndex, tar: str, sidecar: str) -> Shard:
    """The row of a manifest that a sidecar amounts to.

    Raises:
        KeyError, ValueError: its metadata are not ours.
    """
    return Shard(
        tar,
        sidecar,
        len(index),
        int(index.metadata["num_bytes"]),
        index.metadata["fingerprint"],
        tuple(index.aspect_counts().tolist()),
        int(index.metadata["order_bytes"]) if "order_bytes" in index.metadata else None,
    )


@dataclass(frozen=True, eq=False)
class Manifest:
    """The shards of a corpus in their order, by columns.

    Attributes:
        root: folder or URL that locations are relative to.
        tars, sidecars: where each shard and its index lie.
        num_samples_S: samples of each shard that belong to the corpus.
        num_bytes_S: length of each tar.
        fingerprints_SF: of the tars, 32 bytes each.
        aspect_counts_SA: samples of each shard in each aspect bucket.
        selected_N: the samples' numbers inside their shards, shard by shard and ascending, if the corpus is
            only a part of them; None if it is all.
        order_bytes_S: lengths by which the order goes instead of `num_bytes_S`: those of the shards that
            these were made from, so that both corpora have one order.
    """

    root: str
    tars: Texts
    sidecars: Texts
    num_samples_S: npt.NDArray[np.int64]
    num_bytes_S: npt.NDArray[np.int64]
    fingerprints_SF: npt.NDArray[np.uint8]
    aspect_counts_SA: npt.NDArray[np.int64]
    selected_N: npt.NDArray[np.uint32] | None = None
    order_bytes_S: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls, root: str | Path, shards: Sequence[Shard], selected_N: npt.NDArray[np.uint32] | None = None
    ) -> "Manifest":
        """A manifest of these shards."""
        prints = b"".join(bytes.fromhex(shard.fingerprint) for shard in shards)
        order_bytes_S = None
        if any(shard.order_bytes is not None for shard in shards):
            order_bytes = [
                shard.num_bytes if shard.order_bytes is None else shard.order_bytes for shard in shards
            ]
            order_bytes_S = np.array(order_bytes, np.int64)
        return cls(
            str(root),
            Texts.of([shard.tar for shard in shards]),
            Texts.of([shard.sidecar for shard in shards]),
            np.array([shard.num_samples for shard in shards], np.int64),
            np.array([shard.num_bytes for shard in shards], np.int64),
            np.frombuffer(prints, np.uint8).reshape(len(shards), FINGERPRINT_BYTES),
            np.array([shard.aspect_counts for shard in shards], np.int64).reshape(len(shards), NUM_ASPECTS),
            selected_N,
            order_bytes_S,
        )

    def __len__(self) -> int:
        return len(self.tars)

    @cached_property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.num_samples_S.sum())

    @cached_property
    def order_bytes(self) -> int:
        """Length of all tars, as the order takes it to be."""
        return int((self.num_bytes_S if self.order_bytes_S is None else self.order_bytes_S).sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names and content of the shards and what was selected; not over where they lie."""
        digest = hashlib.sha256()
        digest.update("\n".join(base_name(tar) for tar in self.tars).encode("utf-8", "surrogateescape"))
        for column in (self.num_samples_S, self.fingerprints_SF, self.aspect_counts_SA, self.selected_N):
            digest.update(b"-" if column is None else np.ascontiguousarray(column).data)
        if self.order_bytes_S is not None:
            digest.update(np.ascontiguousarray(self.order_bytes_S).data)
        return digest.hexdigest()

    @cached_property
    def selected_ends_S(self) -> npt.NDArray[np.int64]:
        """Where each shard's part of `selected_N` ends."""
        return np.cumsum(self.num_samples_S)

    def shard(self, shard: int) -> Shard:
        """All that the manifest says of a shard."""
        return Shard(
            self.tars[shard],
            self.sidecars[shard],
            int(self.num_samples_S[shard]),
            int(self.num_bytes_S[shard]),
            self.fingerprints_SF[shard].tobytes().hex(),
            tuple(self.aspect_counts_SA[shard].tolist()),
            None if self.order_bytes_S is None else int(self.order_bytes_S[shard]),
        )

    def tar(self, shard: int) -> str:
        """Where a shard's tar lies."""
        return join(self.root, self.tars[shard])

    def sidecar(self, shard: int) -> str:
        """Where a shard's sidecar lies."""
        return join(self.root, self.sidecars[shard])

    def selected(self, shard: int) -> npt.NDArray[np.uint32] | None:
        """Numbers inside the tar of a shard's samples, ascending; None for all of them."""
        if self.selected_N is None:
            return None
        end = int(self.selected_ends_S[shard])
        return self.selected_N[end - int(self.num_samples_S[shard]) : end]

    def name(self, shard: int, key: str) -> str:
        """How messages call a sample."""
        return f"{self.tars[shard]}:{key}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a folder's manifest, whole or not at all."""
    columns = {
        "tar_bytes": manifest.tars.text_bytes,
        "tar_ends": manifest.tars.ends,
        "sidecar_bytes": manifest.sidecars.text_bytes,
        "sidecar_ends": manifest.sidecars.ends,
        "num_samples": manifest.num_samples_S,
        "num_bytes": manifest.num_bytes_S,
        "fingerprints": manifest.fingerprints_SF,
        "aspect_counts": manifest.aspect_counts_SA,
    }
    if manifest.selected_N is not None:
        columns["selected"] = manifest.selected_N
    if manifest.order_bytes_S is not None:
        columns["order_bytes"] = manifest.order_bytes_S
    about = {
        "version": MANIFEST_VERSION,
        "aspects": " ".join(f"{aspect:.6f}" for aspect in ASPECTS),
        "num_samples": str(manifest.num_samples),
        "num_shards": str(len(manifest)),
        "fingerprint": manifest.fingerprint,
    }
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(column) for name, column in columns.items()}, about
    )
    write_whole(folder / MANIFEST_NAME, data)


def load_manifest(root: str, remedy: str, data: bytes | None = None) -> Manifest:
    """A folder's manifest as it was written, without a look at the shards.

    Args:
        root: the folder, or the URL that `data` was fetched below.
        remedy: what makes it anew, a command.
        data: content of a manifest that is not a local file.

    Raises:
        DataError: no manifest, or not one of ours.
    """
    location = join(root, MANIFEST_NAME)
    try:
        content = np.frombuffer(data, np.uint8) if data is not None else mapped(location)
        header, start = read_header(content)
        version = header["__metadata__"]["version"]
        if version != MANIFEST_VERSION:
            raise ValueError(f"version {version}, this program reads {MANIFEST_VERSION}")

        def column(name: str, dtype: type) -> npt.NDArray:
            begin, end = header[name]["data_offsets"]
            return content[start + begin : start + end].view(dtype).reshape(header[name]["shape"])

        return Manifest(
            root,
            Texts(column("tar_bytes", np.uint8), column("tar_ends", np.int64)),
            Texts(column("sidecar_bytes", np.uint8), column("sidecar_ends", np.int64)),
            column("num_samples", np.int64),
            column("num_bytes", np.int64),
            column("fingerprints", np.uint8),
            column("aspect_counts", np.int64),
            column("selected", np.uint32) if "selected" in header else None,
            column("order_bytes", np.int64) if "order_bytes" in header else None,
        )
    except FileNotFoundError:
        raise DataError(f"{root} has no {MANIFEST_NAME}; run: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{location} cannot be read ({error}); run: {remedy}") from error


def concatenate(manifests: Sequence[Manifest]) -> Manifest:
    """Several corpora as one whose shards are numbered through. Locations become absolute."""
    if len(manifests) == 1:
        return manifests[0]
    selected_N = None
    if any(manifest.selected_N is not None for manifest in manifests):
        selected_N = np.concatenate([_selected_or_all(manifest) for manifest in manifests])
    order_bytes_S = None
    if any(manifest.order_bytes_S is not None for manifest in manifests):
        order_bytes_S = np.concatenate(
            [
                manifest.num_bytes_S if manifest.order_bytes_S is None else manifest.order_bytes_S
                for manifest in manifests
            ]
        )
    return Manifest(
        "",
        Texts.of([manifest.tar(shard) for manifest in manifests for shard in range(len(manifest))]),
        Texts.of([manifest.sidecar(shard) for manifest in manifests for shard in range(len(manifest))]),
        np.concatenate([manifest.num_samples_S for manifest in manifests]),
        np.concatenate([manifest.num_bytes_S for manifest in manifests]),
        np.concatenate([manifest.fingerprints_SF for manifest in manifests]),
        np.concatenate([manifest.aspect_counts_SA for manifest in manifests]),
        selected_N,
        order_bytes_S,
    )


def _selected_or_all(manifest: Manifest) -> npt.NDArray[np.uint32]:
    if manifest.selected_N is not None:
        return manifest.selected_N
    starts = manifest.selected_ends_S - manifest.num_samples_S
    return (np.arange(manifest.num_samples) - np.repeat(starts, manifest.num_samples_S)).astype(np.uint32)
