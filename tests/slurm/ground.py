"""What runs of this folder stand on: tiny models, generated shards, and the words that name them."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image


def lay(folder: Path) -> None:
    """Makes folder/models and folder/shards with the commands that a user has."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(24):
        Image.new("RGB", (64, 64), (index * 10, 255 - index * 7, index * 5)).save(
            pictures / f"{index:02}.png"
        )
        (pictures / f"{index:02}.txt").write_text(f"a plain square, shade {index}")
    for words in (
        ["data", "pack", str(pictures), str(folder / "shards"), "--samples-per-shard", "8"],
        ["models", "init", "--size", "tiny", str(folder / "models")],
    ):
        subprocess.run([sys.executable, "-m", "kandinsky_dist", *words], check=True)


def arguments(ground: Path, run_dir: Path, num_steps: int, *more: str) -> list[str]:
    """Settings of a run of `num_steps` steps of 8 samples, in fp32, logged at every step."""
    words = ["--model.prior", f"{ground}/models/prior", "--model.decoder", f"{ground}/models/decoder"]
    words += ["--data.shards", f"{ground}/shards", "--run.dir", str(run_dir), "--parallel.precision", "fp32"]
    words += ["--data.global_batch_size", "8", "--data.micro_batch_size", "2"]
    return [*words, "--run.max_steps", str(num_steps), "--telemetry.log_every_steps", "1", *more]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, as the run logged it."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}
