"""One command in both directions: what SRC is decides what OUT becomes."""

from pathlib import Path

from kandinsky_dist.checkpoint.export import whole_checkpoint
from kandinsky_dist.checkpoint.foreign.kinds import Kind, partitions_in, saved_by
from kandinsky_dist.checkpoint.foreign.saved import Saved
from kandinsky_dist.checkpoint.foreign.scripts import read_script_folder
from kandinsky_dist.checkpoint.foreign.universal import read_universal, write_universal
from kandinsky_dist.errors import CheckpointError, ConfigError
from kandinsky_dist.optim.ema import decays_among


def convert(src: Path, out: Path, *, step: int | None, global_batch_size: int | None) -> list[str]:
    """Makes a run folder of what another trainer saved, or a universal checkpoint of what a run of ours did.

    Args:
        src: of DeepSpeed or the diffusers scripts; or a run folder or checkpoint of ours.
        out: new or empty folder.
        step: optimizer steps, where `src` does not say them or says them wrongly.
        global_batch_size: samples a step, likewise.

    Returns:
        What was made and how one goes on, line by line.

    Raises:
        CheckpointError: `src` is nothing that can be converted, or not whole.
        ConfigError: `out` cannot be made there, or an option does not apply.
    """
    for name, value in (("--step", step), ("--global-batch-size", global_batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be above 0")
    kind = saved_by(src) if src.is_dir() else None
    if kind is Kind.OWN:
        if step is not None or global_batch_size is not None:
            raise ConfigError(f"--step and --global-batch-size do not apply: {src} is {kind.value}")
        checkpoint = whole_checkpoint(src)
        made = write_universal(checkpoint, out)
        return [f"{made}: {checkpoint.name} as {Kind.UNIVERSAL.value}; engine.load_checkpoint({str(out)!r})"]
    if kind is Kind.UNIVERSAL:
        saved = read_universal(src, step=step, global_batch_size=global_batch_size)
    elif kind is Kind.SCRIPT:
        saved = read_script_folder(src, step=step, global_batch_size=global_batch_size)
    else:
        raise CheckpointError(_refusal(src, kind))
    made = saved.write(out)
    return [f"{made}: {_contents(saved)}", _continuation(saved, out)]


def _refusal(src: Path, kind: Kind | None) -> str:
    if not src.is_dir():
        return f"{src} is no folder"
    if kind is Kind.PARTITIONED:
        partitions = partitions_in(src)
        return (
            f"{partitions} is {Kind.PARTITIONED.value}. DeepSpeed makes a universal one of it; it unpickles, "
            "so only where you trust the files: python -m deepspeed.checkpoint.ds_to_universal "
            f"--inject_missing_state --input_folder {partitions} --output_folder {partitions}_universal"
        )
    if kind is Kind.SCRIPT_RUN:
        return f"{src} is {kind.value}: name one of its checkpoint-N folders"
    if kind is Kind.PIPELINE:
        return f"{src} is {kind.value}, which is used as it is: model.prior, model.decoder or model.weights"
    return f"{src} is neither {', '.join(item.value for item in Kind)}"


def _contents(saved: Saved) -> str:
    words = f"weights and moments after {saved.run.num_updates:,} updates"
    averages = decays_among(saved.kinds)
    if averages:
        decays = ",".join(map(str, averages))
        words += f", and the averages that optim.ema_decay=[{decays}] goes on with"
    return words


def _continuation(saved: Saved, out: Path) -> str:
    return (
        f"continue with run.resume={out}, at step {saved.run.step:,} and sample "
        f"{saved.run.samples_consumed:,} of the order that your data.shards and run.seed give"
    )
