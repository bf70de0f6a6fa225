from pathlib import Path

import pytest
import torch
from filelock import FileLock


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny networks are slower on more threads, and other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prior_folder(tiny_models: Path) -> Path:
    return tiny_models / "prior"


@pytest.fixture(scope="session")
def other_models(shared_folder: Path, prior_folder: Path) -> Path:
    """Folders like `tiny_models`, of another seed."""
    from kandinsky_dist.models.init import initialise

    with FileLock(shared_folder / "other_models.lock"):
        out = shared_folder / "other_models"
        initialise("tiny", out, seed=1, tokenizer=str(prior_folder))
        return out


@pytest.fixture(scope="session")
def decoder_folder(tiny_models: Path) -> Path:
    return tiny_models / "decoder"
