"""`bench suite`: the measurements that the page about performance is made of, in one command."""

from collections.abc import Sequence
from pathlib import Path

from kandinsky_dist.bench import scaling, train
from kandinsky_dist.bench.performance import to_markdown
from kandinsky_dist.bench.train import Inputs
from kandinsky_dist.bench.train_measure import Plan
from kandinsky_dist.config.schema import STAGES
from kandinsky_dist.models.architectures import Size

PLANS: dict[Size, Plan] = {
    "tiny": Plan(num_warmup=2, num_steps=2, num_repeats=3, num_alive=0),
    # A case holds up to 4 GiB, and a machine that is short of memory measures its disk.
    "small": Plan(num_warmup=1, num_steps=1, num_repeats=3, num_alive=4),
    # A step of the baseline takes seconds, most of them to decode photographs, the fastest case's a fraction.
    "full": Plan(num_warmup=2, num_steps=1, num_repeats=3, num_alive=2, most_times=16),
}


def run(out: Path, *, size: Size, models: Path | None, shards: str | None, strategies: Sequence[str]) -> None:
    """The ladder of both stages, then scaling; writes their records and OUT/performance.md.

    Args:
        out: folder.
        size: of the networks. Scaling has the tiny prior where the ladder has small networks: a CPU's cores
            are shared by all ranks, and the point is what dividing the work costs.
        models: folder with prior/ and decoder/, or None.
        shards: as data.shards, or None.
        strategies: engines of the scaling.
    """
    inputs = Inputs(size=size, models=models, shards=shards, settings={})
    train.run(out, PLANS[size], inputs, stages=STAGES, vary=[], with_baseline=True, world_size=1)
    fewer: Size = "tiny" if size == "small" else size
    scaling.run(
        out,
        PLANS[fewer],
        Inputs(size=fewer, models=models, shards=shards, settings={}),
        stages=STAGES if size == "full" else STAGES[:1],
        strategies=strategies,
        modes=scaling.MODES,
        ranks=[],
    )
    (out / "performance.md").write_text(to_markdown(out), "utf-8")
