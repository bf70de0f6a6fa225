"""What `data check` has found, in figures."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from kandinsky_dist.data.aspects import ASPECTS
from kandinsky_dist.data.checking.report_text import aspect_name
from kandinsky_dist.data.checking.statistics import Histogram, Repeats
from kandinsky_dist.data.checking.survey import Findings, Unreadable

NUM_NAMED = 5
MAX_TOKENS = 77
PERCENTILES = (5, 50, 95)
NOT_COMPARED = Repeats(0, 0, 0)


@dataclass
class Report:
    """What a corpus consists of, and what is wrong with it.

    Attributes:
        shards: as they were named.
        findings: of all shards.
        images, captions: how many are there more than once.
        one_in: kinds of content of which one was compared.
        reasons: unreadable samples by the kind of trouble.
        first: the first few of each.
        tokens: of the captions that were read, with start and end token; None without a tokenizer.
        num_processes: that an epoch is estimated for.
    """

    shards: str
    num_samples: int
    num_shards: int
    num_bytes: int
    fingerprint: str
    resolution: int
    num_processes: int
    one_in: int
    findings: Findings = field(default_factory=Findings)
    images: Repeats = NOT_COMPARED
    captions: Repeats = NOT_COMPARED
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[Unreadable]] = field(default_factory=dict)
    tokens: Histogram | None = None

    @property
    def num_unreadable(self) -> int:
        """Samples that were read and cannot be used."""
        return self.reasons.total()

    @property
    def problem(self) -> str:
        """One line about what is damaged, or ""."""
        parts = []
        if self.findings.disagreeing:
            parts.append(
                f"{len(self.findings.disagreeing):,} of {self.num_shards:,} shards are not what was indexed, "
                f"first {self.findings.disagreeing[0]}"
            )
        if self.num_unreadable:
            worst = self.reasons.most_common(1)[0][0]
            first = self.first[worst][0]
            parts.append(
                f"{self.num_unreadable:,} of {self.findings.num_read:,} samples that were read cannot be "
                f"used, first {first.shard}:{first.key}: {first.error}"
            )
        return "; ".join(parts)

    @property
    def samples_per_second(self) -> float:
        """That one process reads and decodes; 0 if nothing was read."""
        return self.findings.num_read / self.findings.seconds if self.findings.seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """All figures as JSON values, units in the names."""
        found = self.findings
        figures: dict[str, Any] = {
            "shards": self.shards,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "num_shards": self.num_shards,
            "num_bytes": self.num_bytes,
            "num_members": dict(sorted(found.members.items())),
            "image_file_bytes": _spread(found.image_bytes),
            "image_short_side_pixels": _spread(found.short_sides),
            "image_long_side_pixels": _spread(found.long_sides),
            "num_images_of_unknown_size": found.num_unknown_sizes,
            "num_images_smaller_than_resolution": found.short_sides.count
            - found.short_sides.num_above(self.resolution - 1),
            "resolution_pixels": self.resolution,
            "num_samples_by_aspect": {
                aspect_name(aspect): count
                for aspect, count in zip(ASPECTS, found.aspect_counts_A.tolist(), strict=True)
            },
            "caption_bytes": _spread(found.caption_bytes),
            "caption_characters": _spread(found.caption_characters),
            "num_empty_captions": int(found.caption_characters.counts_K[0]),
            "repeated_images": {**asdict(self.images), "share": self.images.share},
            "repeated_captions": {**asdict(self.captions), "share": self.captions.share},
            "compared_one_in": self.one_in,
            "num_images_without_checksum": found.num_unprinted,
            "num_left_out_by_indexing": dict(found.num_left_out),
            "first_left_out_by_indexing": found.first_left_out,
            "num_disagreeing_shards": len(found.disagreeing),
            "first_disagreeing_shards": found.disagreeing[:NUM_NAMED],
            "num_read": found.num_read,
            "num_unreadable": self.num_unreadable,
            "unreadable": {
                reason: {"num_samples": count, "first": [asdict(sample) for sample in self.first[reason]]}
                for reason, count in self.reasons.most_common()
            },
            "read_samples_per_second_per_process": self.samples_per_second,
            "num_processes": self.num_processes,
            "estimated_epoch_seconds": None,
        }
        if self.samples_per_second:
            figures["estimated_epoch_seconds"] = (
                self.num_samples / self.samples_per_second / self.num_processes
            )
        if self.tokens is not None:
            above = self.tokens.num_above(MAX_TOKENS)
            figures["caption_tokens"] = _spread(self.tokens)
            figures["share_of_captions_above_77_tokens"] = above / max(1, self.tokens.count)
        return figures


def _spread(histogram: Histogram) -> dict[str, float]:
    return {
        "count": histogram.count,
        "mean": round(histogram.mean, 2),
        "min": histogram.least,
        **{f"p{percent}": histogram.quantile(percent / 100) for percent in PERCENTILES},
        "max": histogram.most,
    }
