"""Tiny networks and a small corpus, made once for all tests and workers; which cases of the campaign run."""

import gc
import os
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.campaign import FAST_EXAMPLES
from hypothesis import settings

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is the machine's affair.
settings.register_profile("fast", deadline=None, max_examples=FAST_EXAMPLES)
settings.register_profile("campaign", deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --campaign."""
    parser.addoption(
        "--campaign",
        default="none",
        metavar="none|all|K/N",
        help="tests and cases marked campaign: none of them (default), all beside the other tests, or the "
        "K-th of N slices (K from 0 to N - 1) and no other test",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of Hypothesis's examples before test modules are imported."""
    settings.load_profile("fast" if config.getoption("campaign") == "none" else "campaign")


def pytest_collection_finish() -> None:
    """Freeze what imports and collection made, half a million objects, for quicker garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what --campaign asks for."""
    asked = config.getoption("campaign")
    if asked == "all":
        return
    number, _, count = asked.partition("/")
    if asked != "none" and not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise pytest.UsageError(f"--campaign={asked} must be none, all, or K/N with K from 0 to N - 1")

    def is_kept(item: pytest.Item) -> bool:
        is_campaign = item.get_closest_marker("campaign") is not None
        if asked == "none":
            return not is_campaign
        # The campaign has more examples of it than the fast suite.
        is_campaign = is_campaign or getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        # Cases of one test share what it prepares, and so a slice.
        test = item.nodeid.partition("[")[0]
        return is_campaign and zlib.crc32(test.encode()) % int(count) == int(number)

    kept = [item for item in items if is_kept(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
        items[:] = kept


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this test session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[Path]:
    """One worker makes it, the others wait and find it made."""
    with FileLock(folder / f"{name}.lock"):
        yield folder / name


@pytest.fixture(scope="session")
def tiny_models(shared_folder: Path) -> Path:
    """prior/ and decoder/: random tiny pipelines with CLIP's real tokenizer."""
    from kandinsky_dist.models.init import initialise

    with _alone(shared_folder, "tiny_models") as out:
        initialise("tiny", out)
        return out


@pytest.fixture(scope="session")
def small_corpus(shared_folder: Path) -> Path:
    """train/ with 96 samples in 3 shards, validation/ with 32 in 2; their keys are all different."""
    from helpers.pictures import write_corpus

    with _alone(shared_folder, "small_corpus") as out:
        write_corpus(out / "train", 0, 96, samples_per_shard=32, prefix="train")
        write_corpus(out / "validation", 96, 32, samples_per_shard=16, prefix="validation")
        return out
