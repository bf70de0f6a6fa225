"""The plan of `launch/gpu.sh`: its steps, most important first.

The seconds are for one H200 with 16 cores and the published shapes. They are estimates until a record exists.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kandinsky_dist.bench.gpu.steps import Step
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.models.architectures import Size
from kandinsky_dist.models.tokenizer import VOCABULARY_MEMBER, VOCABULARY_PACKAGE, vocabulary_cache

INPUTS = "networks and corpus"
TESTS = "pytest -m gpu"
MEMORY = "memory of a step"

TRAINING_PACKAGES = ("diffusers", "transformers", "accelerate", "webdataset", "simplejpeg", "matplotlib")
TEST_PACKAGES = (
    "pytest", "pytest_timeout", "hypothesis", "filelock", "diffusers", "transformers", "webdataset",
    "simplejpeg",
)  # fmt: skip
SHORT = ("--warmup", "1", "--steps", "1", "--repeats", "3")
"""Of `bench train`: a step of the baseline takes seconds."""

ANY_SECONDS = (5.0, 500.0)
"""Least and most, of networks that only test the plan, on machines of any speed."""


def is_importable(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return find_spec(package) is not None


def plan(
    scratch: Path,
    tests: Path,
    *,
    size: Size,
    device_type: str,
    stages: Sequence[Stage],
    is_there: Callable[[str], bool] = is_importable,
) -> list[Step]:
    """Return the steps.

    Args:
        scratch: existing folder for networks, corpora and what commands write. All steps share it, so that
            networks, corpus and cached encoder outputs are made once.
        tests: the checkout's folder of tests.
        size: of the networks.
        device_type: "cuda" or "cpu".
        stages: trained networks.
        is_there: whether a package is installed.
    """
    work = scratch / "bench"
    is_gpu = device_type == "cuda"
    vocabulary = missing_vocabulary()

    def timed(least: float, most: float, **rest: Any) -> Step:
        least, most = (least, most) if size == "full" else ANY_SECONDS
        return Step(least_seconds=least, most_seconds=most, **rest)

    def missing(packages: Sequence[str]) -> tuple[str, ...]:
        return (*(name for name in packages if not is_there(name)), *vocabulary)

    def bench(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "kandinsky_dist", "bench", name, str(work), "--size", size, *arguments)

    gpu_tests = [str(path) for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    settings = ("--parallel.precision", "bf16", "--vary", "parallel.compile", "true") if is_gpu else ()
    steps = [
        timed(
            60,
            210,
            name=INPUTS,
            command=bench("inputs"),
            missing=missing(TRAINING_PACKAGES),
            is_background=is_gpu,  # the tests measure no time; a CPU's few cores gain nothing
        ),
        timed(
            30,
            120,
            name=TESTS,
            command=(
                sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider",
                "--basetemp", str(scratch / "pytest"), *gpu_tests,
            ),
            missing=(
                *(() if is_gpu else ("a CUDA device",)),
                *(() if gpu_tests else ("the checkout's tests",)),
                *missing(TEST_PACKAGES),
            ),
        ),
    ]  # fmt: skip
    for stage in stages:
        steps.append(
            timed(
                75,
                240,
                name=f"{stage} beside baseline",
                command=bench(
                    "train", "--stage", stage, *SHORT, "--vary", "data.source", "cached", *settings
                ),
                after=(INPUTS,),
                missing=missing(TRAINING_PACKAGES),
                record=work / "train.json",
                kept_as=f"train_{stage}.json",
            )
        )
    steps.append(
        timed(
            40,
            150,
            name=MEMORY,
            command=bench("memory-gpu", "--stage", *stages),
            after=(INPUTS,),
            missing=missing(TRAINING_PACKAGES),
            record=work / "memory_gpu.json",
            kept_as="memory_gpu.json",
        )
    )
    return steps


def missing_vocabulary() -> tuple[str, ...]:
    """Return the name of CLIP's vocabulary if random networks cannot be made for lack of it.

    Without PIP_NO_INDEX pip may have a network and fetch it.
    """
    if (vocabulary_cache() / Path(VOCABULARY_MEMBER).name).is_file() or not os.environ.get("PIP_NO_INDEX"):
        return ()
    name = VOCABULARY_PACKAGE.partition("==")[0].replace("-", "_")
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    return () if any([*Path(folder).glob(f"{name}-*.whl")] for folder in folders) else (f"{name}'s wheel",)
