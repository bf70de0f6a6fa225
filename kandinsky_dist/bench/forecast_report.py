"""What `estimate` predicts, as Markdown. All figures come from the record."""

from typing import Any

from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, percent, table, wrapped

Row = dict[str, Any]
GIB = 2**30
PARTS = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "averages",
    "encoders",
    "buckets",
    "gathered",
    "activations",
    "encoding",
    "stepping",
)

INTRODUCTION = """
What a run will need before anybody queues for it. Nothing on this page was measured on the GPUs that it
speaks of: it is computed from the networks' shapes, published rates and the assumptions below, and a
measured record replaces those where there is one (`--record`, `--comm`). `kandinsky-dist estimate
{{prior,decoder}} --config NAME_OR_FILE --gpus N` answers the same for any configuration, on a login node.
"""
PROVENANCE = "Computed {date} ({versions}) by `{command}`."
ASSUMED = """
{gpu}, {gpus_per_node} a node, a {nic_gbits:g} Gb/s NIC a GPU ({source}). {compute} {network} {share:.0%} of a
GPU's memory is left to the CUDA context, NCCL, workspaces and the allocator's gaps.
"""
ASSUMED_COMPUTE = """
Computing: {mfu:.1%} of the published {peak:,.1f} TFLOP/s for each further sample, and
{fixed:.1f} ms for each micro-batch, whatever its size.
"""
MEASURED_COMPUTE = "Computing: as measured in the record that was given."
ASSUMED_NETWORK = "Collectives: NCCL's own cost model on 82 % of NVLink's and 94 % of the NICs' line rate."
MEASURED_NETWORK = "Collectives: as measured in the record that was given."
MEMORY = """
GiB of one GPU at its fullest moment. **activations** (forward and backward), **encoding** (the frozen
encoders while they run) and **stepping** (fp32 copies of gradients inside the step) are never there
together; the largest counts. **largest** is the largest micro-batch that fits.
"""
TIME = """
Milliseconds of an optimizer step. **exposed** is what of the communication no computing hides; **update** is
clipping, AdamW and averages. **kept** is the computing's share of the step.
"""
CANDIDATES = """
For every strategy the quickest combination of micro-batch, bucket and recomputation that fits, quickest
first; fsdp2/{gpus_per_node} shares one copy of the weights inside a node.
"""
PUBLISHED = """
Runs of MLPerf training 4.1 by NVIDIA (Stable Diffusion v2's U-Net at 512 pixels, latents and text encoded
beforehand, DGX H100, {rate:g} images a second and GPU on one node). Micro-batches are those of the
submission's configurations, and shrink because the global batch may not grow with the GPUs. Two parameters,
the computing time of a micro-batch as a line in its size, are fitted to the rows marked so; everything else
is published rates. The other rows are predictions.
"""
VERDICT = """
**Result.** The predictions are off by {worst:.1%} at most. With the micro-batch of one node the same model
keeps {steady:.0%} of the rate on {num_gpus:,} GPUs, where {scaling:.0%} was published: most was lost to
micro-batches of {micro}, which compute less well and hide less communication, and not to the network's
bandwidth. So these points test the line of computing time, and that what is exposed is small; they say little
of a network that cannot keep up.
"""
MEASURED = """
Steps of several ranks by `bench scaling`, predicted from the step of one rank and the collectives that `bench
comm` measured on the same machine. Ranks of one CPU share its memory, and some its cores: for ddp there the
model is given what as many ranks take that exchange nothing, and has to say what the exchange adds.
"""
NOTES = """
**Memory.** States: the formulas of [memory.md](memory.md), held there against living tensors. Activations:
the real forward and backward run on tensors without memory (torch's fake tensors), and every storage is
counted from its birth to its end; tests hold the same count on real tensors equal to it, and the prior's to
the peak of torch's own allocator (a CPU's convolutions allocate for themselves). Norms get the types that
CUDA's autocast gives them; attention keeps what fused kernels keep. What kernels allocate inside themselves
(cuDNN's workspaces) is left to the headroom. No peak of a GPU has been compared yet.

**fsdp2** is counted with the weights of the blocks that are gathered at once; **zero3** with up to
stage3_max_live_parameters gathered, which in the shipped file is nearly the whole network.

**Computing** is a line in the micro-batch. The share of the peak and the time of an empty micro-batch were
fitted to MLPerf's U-Net and are taken for the prior too, and for encoders: an assumption, until `bench train`
has run on the GPU and --record names what it wrote. Backward is taken as two thirds of forward and backward;
recomputation adds a forward.

**Collectives** take what NCCL's cost model says (src/graph/tuning.cc: latency by hop, the quicker of rings
and trees, Simple or LL128), without in-network reduction and without NCCL's newer algorithms for gathering
and reduce-scattering, whose latency grows with the logarithm of the ranks: among 1,024 GPUs these may be
quicker than they look here. A bucket is sent when its part of backward is over; buckets follow one another
on one link; what is left at the end of backward is exposed. zero1 and zero2 sum buckets with an all-reduce,
as DeepSpeed 0.19 does, and gather weights after the step, which nothing hides. zero2 and zero3 reduce every
micro-batch, the others once a step. fsdp2 and zero3 gather weights ahead of each block in forward and
backward.

**Left out**: kernels that slow down while NCCL runs beside them, stragglers (but for --jitter), the loader,
checkpoints, validation, and networks that are shared with others.
"""


def to_markdown(record: Record) -> str:
    """The whole page."""
    published = _of_kind(record, "published")
    parts = ["# Estimates\n", wrapped(INTRODUCTION.format()) + "\n", _provenance(record)]
    parts += _stages(record)
    if published:
        parts += [
            "## Held against published runs\n",
            wrapped(PUBLISHED.format(rate=published[0]["rate"])) + "\n",
            _published(published),
        ]
    measured = _of_kind(record, "measured")
    if measured:
        parts += ["## Held against measured steps\n", wrapped(MEASURED) + "\n", _measured(measured)]
    notes = [wrapped(note, bullet="- ") + "\n" for note in NOTES.strip().split("\n\n")]
    return "\n".join([*parts, "## How it works\n", "".join(notes)])


def summary(record: Record) -> str:
    """The tables, for a terminal."""
    return "\n".join([_provenance(record), *_stages(record)])


def _of_kind(record: Record, kind: str, stage: str | None = None) -> list[Row]:
    return [row for row in record.rows if row["kind"] == kind and stage in (None, row.get("stage"))]


def _provenance(record: Record) -> str:
    setting = record.setting
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    made = PROVENANCE.format(date=record.date, versions=versions, command=record.command)
    compute = MEASURED_COMPUTE
    if setting["mfu"] is not None:
        compute = ASSUMED_COMPUTE.format(
            mfu=setting["mfu"], peak=setting["peak_tflops"], fixed=1e3 * setting["fixed_seconds"]
        )
    network = MEASURED_NETWORK if setting["has_measured_links"] else ASSUMED_NETWORK
    assumed = ASSUMED.format(**setting, compute=compute, network=network, share=setting["headroom"])
    return f"{wrapped(made)}\n\n{wrapped(assumed)}\n"


def _stages(record: Record) -> list[str]:
    parts = []
    for network in _of_kind(record, "network"):
        stage = network["stage"]
        forecasts = _of_kind(record, "forecast", stage)
        candidates = _of_kind(record, "candidate", stage)
        parts += [
            f"## The {stage}\n",
            wrapped(_about(network, forecasts[0])) + "\n",
            "### Memory\n",
            wrapped(MEMORY) + "\n",
            _memory(forecasts),
            "### Time\n",
            wrapped(TIME) + "\n",
            _time(forecasts),
        ]
        if not network["is_alone"]:
            explained = wrapped(CANDIDATES.format(**record.setting)) + "\n"
            parts += ["### What else there is\n", explained, _candidates(candidates)]
    return parts


def _about(network: Row, forecast: Row) -> str:
    size = (
        f"{network['resolution']} pixels"
        if network["resolution"]
        else f"{network['num_text_tokens']} text tokens"
    )
    trained = network["flops_per_sample"] - network["encoder_flops"]
    whose = "the published shapes" if network["is_published"] else "the shapes of its folder"
    live = (
        f"frozen encoders of {network['encoder_values']:,} run beside it "
        f"({network['encoder_flops'] / 1e12:.3f} TFLOP more)"
        if network["encoder_values"]
        else "no encoder runs"
    )
    return (
        f"{network['num_trained']:,} trained weights of {network['num_values']:,} ({whose}), "
        f"{network['precision']}, {size}: {trained / 1e12:.3f} TFLOP a sample; {live}. "
        f"Strategy {_way(forecast)}, {forecast['global_batch_size']:,} samples a step."
    )


def _way(row: Row) -> str:
    strategy = f"{row['strategy']}/{row['shard_size']}" if row["shard_size"] else row["strategy"]
    return f"{strategy}, recomputing" if row["is_recomputed"] else strategy


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _memory(rows: list[Row]) -> str:
    parts = [name for name in PARTS if any(row[f"{name}_bytes"] for row in rows)]
    columns = [
        Column("GPUs", lambda row: f"{row['num_gpus']:,}"),
        Column("micro-batch", lambda row: str(row["micro_batch_size"])),
        *(Column(name, lambda row, key=f"{name}_bytes": _gib(row[key])) for name in parts),  # type: ignore[misc]
        Column("together", lambda row: _gib(row["total_bytes"])),
        Column("room", lambda row: _gib(row["room_bytes"])),
        Column("fits", lambda row: "yes" if row["total_bytes"] <= row["room_bytes"] else "no"),
        Column("largest", lambda row: str(row["largest_micro_batch_size"])),
    ]
    return table(columns, rows)


def step_seconds(row: Row) -> float:
    """Of a step, all its parts."""
    names = ("compute", "exposed", "update", "waiting")
    return float(sum(row[f"{name}_seconds"] for name in names))


def _time(rows: list[Row]) -> str:
    def part(name: str) -> Column:
        return Column(name, lambda row: f"{1e3 * row[f'{name}_seconds']:,.1f}")

    columns = [
        Column("GPUs", lambda row: f"{row['num_gpus']:,}"),
        Column("micro-batches", lambda row: f"{row['num_micro']} x {row['micro_batch_size']}"),
        *(part(name) for name in ("compute", "communication", "exposed", "update")),
        *([part("waiting")] if any(row["waiting_seconds"] for row in rows) else []),
        Column("step", lambda row: f"{1e3 * step_seconds(row):,.1f}"),
        Column("kept", lambda row: f"{row['compute_seconds'] / step_seconds(row):.1%}"),
        Column("samples/s", lambda row: f"{row['samples_per_second']:,.0f}"),
        Column("a GPU", lambda row: f"{row['samples_per_second'] / row['num_gpus']:,.1f}"),
    ]
    return table(columns, rows)


def _candidates(rows: list[Row]) -> str:
    if not rows:
        return "Nothing fits.\n"
    columns = [
        Column("GPUs", lambda row: f"{row['num_gpus']:,}"),
        Column("strategy", _way, is_number=False),
        Column("bucket MiB", lambda row: f"{row['bucket_mib']:g}" if row["bucket_mib"] else "-"),
        Column("micro-batches", lambda row: f"{row['num_micro']} x {row['micro_batch_size']}"),
        Column("GiB", lambda row: _gib(row["total_bytes"])),
        Column("exposed ms", lambda row: f"{1e3 * row['exposed_seconds']:,.1f}"),
        Column("step ms", lambda row: f"{1e3 * step_seconds(row):,.1f}"),
        Column("samples/s", lambda row: f"{row['samples_per_second']:,.0f}"),
    ]
    return table(columns, rows)


def _measured(rows: list[Row]) -> str:
    columns = [
        Column("device", lambda row: row["device"], is_number=False),
        Column("stage", lambda row: row["stage"], is_number=False),
        Column("strategy", lambda row: row["strategy"], is_number=False),
        Column("scaling", lambda row: row["mode"], is_number=False),
        Column("ranks", lambda row: str(row["num_ranks"])),
        Column("measured ms", lambda row: f"{1e3 * row['measured_seconds']:.1f}"),
        Column("predicted ms", lambda row: f"{1e3 * row['predicted_seconds']:.1f}"),
        Column("off", lambda row: percent(row["predicted_seconds"] / row["measured_seconds"] - 1)),
    ]
    return table(columns, rows)


def _published(rows: list[Row]) -> str:
    def off(row: Row) -> float:
        return float(row["predicted_seconds"] / row["measured_seconds"] - 1)

    columns = [
        Column("GPUs", lambda row: f"{row['num_gpus']:,}"),
        Column("micro-batch", lambda row: str(row["micro_batch_size"])),
        Column("published scaling", lambda row: f"{row['scaling']:.0%}"),
        Column("published ms", lambda row: f"{1e3 * row['measured_seconds']:.1f}"),
        Column("computing ms", lambda row: f"{1e3 * row['compute_seconds']:.1f}"),
        Column("step ms", lambda row: f"{1e3 * row['predicted_seconds']:.1f}"),
        Column("off", lambda row: percent(off(row))),
        Column("", lambda row: "fitted" if row["is_fitted"] else "predicted", is_number=False),
    ]
    last = rows[-1]
    verdict = VERDICT.format(
        worst=max(abs(off(row)) for row in rows if not row["is_fitted"]),
        num_gpus=last["num_gpus"],
        steady=last["steady_scaling"],
        scaling=last["scaling"],
        micro=last["micro_batch_size"],
    )
    return f"{table(columns, rows)}\n{wrapped(verdict)}\n"
