"""What `bench draws` measured, as Markdown. All figures come from the record."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table, wrapped

INTRODUCTION = """
`objective.noise_draws=K` trains on K noises and timesteps of each caption in one forward pass. Text comes
first in the prior's sequence and attention is causal, so the text's keys and values are the same for all
of them and are computed once: L + 1 + 3 K tokens in place of K (L + 4). Losses and gradients are the mean
over K separate passes.
"""
COUNTING = """
The gradient's variance is the mean squared distance of one caption's gradient from the mean gradient,
over {num_captions} captions; that of a batch of B captions is B times smaller. The prior is the tiny one
on the demo corpus, after some optimizer steps of 32 captions each; the captions are those that come next.
FLOPs are counted: the tiny prior at the corpus's text length of {text_tokens} tokens, full-size networks
at {full_text_tokens}, with the frozen encoders' outputs cached or computed in each step.
"""
NOTES = """
**Captions alone** is what of one draw's variance does not depend on the noise: the covariance of two
gradients of the same caption, each with noise and a timestep of its own. No number of draws takes it
away.

**Draws** of a caption have independent noise. Their timesteps are spread evenly over the diffusion from a
uniform start: each alone is distributed as a single draw's, so the mean is unbiased, but they do not
crowd.

**The same FLOPs** is variance times FLOPs: what is left of the variance when the FLOPs of more draws are
taken from the number of captions. Below 100 % more draws are the better use of the machine, above it more
captions are. Here more draws pay {verdict}

**Full-size networks** are counted exactly, but the variance beside their FLOPs is the tiny prior's. How
much of it is noise changes with network, corpus and the progress of training: measure it on your own.
"""
KINDS = {"tiny_cached": "tiny, cached", "full_cached": "full size, cached", "full_live": "full size, live"}

Row = dict[str, Any]


def to_markdown(record: Record) -> str:
    """The whole page."""
    stages = list(dict.fromkeys(row["num_steps"] for row in record.rows))
    by_place = {(row["num_steps"], row["noise_draws"]): row for row in record.rows}
    more = [draws for stage, draws in by_place if stage == stages[0] and draws > 1]

    def share(stage: int, draws: int, *keys: str) -> float:
        """Of one draw's figure, in percent."""
        found, one = by_place[stage, draws], by_place[stage, 1]
        return 100 * math.prod(found[key] / one[key] for key in keys)

    def variance(stage: int, draws: int) -> str:
        error = 100 * by_place[stage, draws]["ratio_standard_error"]
        return f"{share(stage, draws, 'variance'):.1f} +- {error:.1f} %"

    def loss(stage: int) -> str:
        return f"{by_place[stage, 1]['loss']:.3f}"

    def captions_alone(stage: int) -> str:
        one = by_place[stage, 1]
        return f"{100 * one['shared_variance'] / one['variance']:.0f} %"

    def of_draws(cell: Callable[..., str]) -> list[Column]:
        return [Column(f"K = {draws}", partial(cell, draws=draws)) for draws in more]

    left = {
        (stage, kind): [share(stage, draws, "variance", f"{kind}_flops") for draws in more]
        for stage in stages
        for kind in KINDS
    }
    progress = [Column("steps", str), Column("loss", loss), Column("captions alone", captions_alone)]
    same_captions = table([*progress, *of_draws(variance)], stages)
    networks = Column("networks", lambda kind: KINDS[kind], is_number=False)
    cost = table(
        [networks, *of_draws(lambda kind, draws: f"{share(stages[-1], draws, f'{kind}_flops'):.0f} %")], KINDS
    )
    same_flops = table(
        [
            Column("steps", lambda place: str(place[0])),
            Column("networks", lambda place: KINDS[place[1]], is_number=False),
            *of_draws(lambda place, draws: f"{left[place][more.index(draws)]:.0f} %"),
        ],
        left,
    )
    notes = [note.format(verdict=_verdict(left)) for note in NOTES.split("\n\n")]
    counting = COUNTING.format(**record.setting, text_tokens=by_place[stages[-1], 1]["text_tokens"])
    return "\n".join(
        [
            "# Several noise draws a caption\n",
            wrapped(INTRODUCTION) + "\n",
            wrapped(counting) + "\n",
            wrapped(provenance(record)) + "\n",
            "## The same captions\n",
            "What K draws leave of one draw's variance, with the standard error over the captions:\n",
            same_captions,
            "FLOPs of a caption with K draws, of one draw 100 %:\n",
            cost,
            "## The same FLOPs\n",
            "What is left of one draw's variance when more draws mean fewer captions:\n",
            same_flops,
            "## How to read it\n",
            *(wrapped(note, bullet="- ") for note in notes),
            "",
        ]
    )


def _verdict(left: dict[tuple[int, str], list[float]]) -> str:
    paying = [
        f"{KINDS[kind]} after {stage} steps" for (stage, kind), shares in left.items() if min(shares) < 100
    ]
    return f"for {'; '.join(paying)}." if paying else "nowhere."
