"""What `bench faults` saw, as Markdown. All figures come from the record."""

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, provenance, table, wrapped

COLUMNS = [
    Column("fault", lambda row: row["fault"], is_number=False),
    Column("at step", lambda row: str(row["step"])),
    Column("noticed in, s", lambda row: f"{row['detected_seconds']:.1f}"),
    Column("training again in, s", lambda row: f"{row['resumed_seconds']:.1f}"),
    Column("steps made again", lambda row: str(row["steps_again"])),
    Column("samples lost", lambda row: str(row["samples_lost"])),
    Column("samples repeated", lambda row: str(row["samples_repeated"])),
    Column("loss differs by", lambda row: f"{row['loss_difference']:.1g}"),
    Column("rounding alone", lambda row: f"{row['rounding_difference']:.1g}"),
]
INTRODUCTION = """
One run of {num_steps} steps (the {stage}, `parallel.strategy={strategy}`, {num_nodes} nodes of
{ranks_per_node} ranks) on a Slurm cluster, submitted once with `slurm/{stage}.sbatch`. Each of these things
happened to it, in this order, at a random step. Nobody did anything about it: the job requeued itself, or
the ranks went on. Afterwards every step's samples and loss were compared with those of one process that
nothing happened to.
"""
NOTES = """
**noticed**: until the job said so, was no longer running, or had been started again. **training again**:
until a step was made after it, with the wait for Slurm, the start of Python on every node and the last
checkpoint (every {every_steps} steps). **steps made again** came after that checkpoint; they are made with
the same samples, so none is lost or repeated. **loss differs by**: the largest difference of a step's loss
up to the next fault. {num_ranks} ranks add in another order than one process, and training amplifies what
that changes: **rounding alone** is how far the same job, left in peace, had come from that process by then.
"""


def to_markdown(record: Record) -> str:
    """The page."""
    setting = record.setting
    lost = sum(row["samples_lost"] + row["samples_repeated"] for row in record.rows)
    furthest = max(row["loss_difference"] for row in record.rows)
    result = (
        f"**Result.** {len(record.rows)} faults, {lost} samples lost or repeated, no loss further than "
        f"{furthest:.1g} from the undisturbed run's, no manual step."
    )
    num_ranks = setting["num_nodes"] * setting["ranks_per_node"]
    parts = [
        "# Reliability",
        wrapped(provenance(record)),
        wrapped(INTRODUCTION.format(**setting)),
        wrapped(result),
        table(COLUMNS, record.rows).rstrip("\n"),
        wrapped(NOTES.format(**setting, num_ranks=num_ranks)),
    ]
    return "\n\n".join(parts) + "\n"
