"""The training stream of a run: position -> place, over corpora, weights and aspect buckets.

A tree of pure functions: leaves are plans over the shards of one corpus (or of one aspect bucket of it),
which give each of their samples exactly once in each of their epochs; forks deal out turns to branches.

Letters of shapes: B positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kandinsky_dist.data.aspects import NUM_ASPECTS, WHOLE
from kandinsky_dist.data.interleave import Interleave
from kandinsky_dist.data.manifest import Manifest, concatenate
from kandinsky_dist.data.plan import Plan, default_chunk_samples
from kandinsky_dist.data.tables import Place
from kandinsky_dist.runtime.hashing import Stream, hash_counters

ORDER_VERSION = 3
"""Of the rule by which positions become samples: a run is not resumed under another."""
MIXTURE_PERIOD = 4096
NUM_NEIGHBOURS = 8
"""Attempts at a damaged sample's neighbours before others of its corpus are tried."""
NUM_ATTEMPTS = 16
"""How often a damaged sample's replacement may itself be damaged, the sample included."""


@dataclass(frozen=True)
class Places:
    """Where the samples at some positions lie; see `tables.Place`."""

    shards_B: npt.NDArray[np.int32]
    indices_B: npt.NDArray[np.int64]
    aspects_B: npt.NDArray[np.int8]

    @classmethod
    def empty(cls, size: int) -> "Places":
        """Room for that many."""
        return cls(np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size, np.int8))

    def put(self, where: npt.NDArray[np.bool_], places: "Places") -> None:
        """Fills in the rows that a mask selects."""
        self.shards_B[where] = places.shards_B
        self.indices_B[where] = places.indices_B
        self.aspects_B[where] = places.aspects_B

    def each(self) -> list[Place]:
        """One object a place."""
        rows = zip(self.shards_B.tolist(), self.indices_B.tolist(), self.aspects_B.tolist(), strict=True)
        return [Place(*row) for row in rows]


class Branch(Protocol):
    """An endless sequence of samples."""

    def locate(self, positions: npt.NDArray[np.int64], attempt: int) -> Places:
        """Where the samples at some positions lie, or their replacements of that number."""


class Leaf:
    """The samples of one corpus, or of one aspect bucket of it.

    Args:
        counts_S: samples of each shard.
        num_bytes: of the corpus.
        seed: of the order.
        first_shard: the run's number of the corpus' first shard.
        aspect: bucket, or WHOLE.
    """

    def __init__(
        self, counts_S: npt.NDArray[np.int64], num_bytes: int, *, seed: int, first_shard: int, aspect: int
    ) -> None:
        num_samples = int(counts_S.sum())
        self._plan = Plan(counts_S, seed=seed, chunk_samples=default_chunk_samples(num_samples, num_bytes))
        self._counts_S = counts_S
        self._seed = seed
        self._first_shard = first_shard
        self._aspect = aspect

    def locate(self, positions: npt.NDArray[np.int64], attempt: int) -> Places:
        """See `Branch.locate`: neighbours in the same shard first, which lie near, then any other sample."""
        if attempt > NUM_NEIGHBOURS:
            counters = positions.astype(np.uint64) * np.uint64(NUM_ATTEMPTS) + np.uint64(attempt)
            draws = hash_counters(self._seed, Stream.REPLACEMENT, counters)
            positions = (draws % np.uint64(self._plan.num_samples)).astype(np.int64)
            attempt = 0
        shards_B, indices_B = self._plan.locate(positions)
        if attempt:
            indices_B = (indices_B + attempt) % self._counts_S[shards_B]
        aspects_B = np.full(len(shards_B), self._aspect, np.int8)
        return Places(shards_B + np.int32(self._first_shard), indices_B, aspects_B)


class Fork:
    """Several branches as one.

    Args:
        branches: what turns are dealt out to.
        rates: turns of each branch a period.
        turn_samples: samples of a turn.
        seed: of the order of turns.
    """

    def __init__(
        self, branches: Sequence[Branch], rates: Sequence[Fraction], *, turn_samples: int, seed: int
    ) -> None:
        self._branches = branches
        self._interleave = Interleave(rates, seed=seed)
        self._turn_samples = turn_samples

    def locate(self, positions: npt.NDArray[np.int64], attempt: int) -> Places:
        """See `Branch.locate`: a replacement is of the same branch."""
        turns, inside = np.divmod(positions, self._turn_samples)
        owners, numbers = self._interleave.locate(turns)
        places = Places.empty(len(positions))
        for owner in np.unique(owners):
            where = owners == owner
            inner = numbers[where] * self._turn_samples + inside[where]
            places.put(where, self._branches[owner].locate(inner, attempt))
        return places


class Order:
    """What a run is trained on, in its order.

    Args:
        manifests: the corpora.
        weights: share of the stream that each gets, in any unit; None with one corpus.
        seed: run.seed.
        bucket_samples: None, or the samples that must be of one aspect bucket: the global batch.

    Attributes:
        manifest: all corpora as one, by whose shard numbers places go.
        num_samples: of all corpora: an epoch, where there is one corpus.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        bucket_samples: int | None = None,
    ) -> None:
        assert weights is not None or len(manifests) == 1
        self.manifest = concatenate(manifests)
        self.num_samples = self.manifest.num_samples
        self._seed = seed
        total = sum((_exact(weight) for weight in weights or (1,)), Fraction(0))
        shares = [_exact(weight) / total for weight in weights or (1,)]
        if bucket_samples is None:
            self._root = self._mixture(manifests, shares, WHOLE)
            return
        rates, branches = [], []
        for aspect in range(NUM_ASPECTS):
            parts = [
                share * int(manifest.aspect_counts_SA[:, aspect].sum()) / manifest.num_samples
                for share, manifest in zip(shares, manifests, strict=True)
            ]
            if any(parts):
                branches.append(self._mixture(manifests, parts, aspect))
                rates.append(sum(parts, Fraction(0)) * self.num_samples / bucket_samples)
        self._root = branches[0]
        if len(branches) > 1:
            self._root = Fork(branches, rates, turn_samples=bucket_samples, seed=seed)

    def locate(self, positions: npt.ArrayLike, attempt: int = 0) -> Places:
        """Where the samples at some positions lie.

        Args:
            positions: int64 (B,), non-negative, of any order and epoch.
            attempt: 0, or up to NUM_ATTEMPTS - 1: which replacement is asked for where samples are damaged.
        """
        assert 0 <= attempt < NUM_ATTEMPTS
        return self._root.locate(np.asarray(positions, np.int64), attempt)

    def _mixture(self, manifests: Sequence[Manifest], shares: Sequence[Fraction], aspect: int) -> Branch:
        """The corpora that have samples of a bucket, by their shares."""
        leaves, rates, first_shard = [], [], 0
        for number, (manifest, share) in enumerate(zip(manifests, shares, strict=True)):
            if share:
                counts_S = manifest.num_samples_S if aspect == WHOLE else manifest.aspect_counts_SA[:, aspect]
                # Corpora and buckets of equal shape must not be walked through in step.
                seed = (
                    self._seed if (number, aspect) == (0, WHOLE) else _branch_seed(self._seed, number, aspect)
                )
                num_bytes = manifest.order_bytes * int(counts_S.sum()) // manifest.num_samples
                leaves.append(Leaf(counts_S, num_bytes, seed=seed, first_shard=first_shard, aspect=aspect))
                rates.append(share)
            first_shard += len(manifest)
        if len(leaves) == 1:
            return leaves[0]
        total = sum(rates, Fraction(0))
        period = [rate / total * MIXTURE_PERIOD for rate in rates]
        return Fork(leaves, period, turn_samples=1, seed=_branch_seed(self._seed, len(manifests), aspect))


def _exact(weight: float) -> Fraction:
    """A weight as it was written: 0.1 is a tenth."""
    return Fraction(str(weight))


def _branch_seed(seed: int, number: int, aspect: int) -> int:
    counter = number * (NUM_ASPECTS + 1) + aspect + 1
    return int(hash_counters(seed, Stream.BRANCH_SEED, np.array([counter]))[0])
