from pathlib import Path

import pytest
import torch


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
def decoder_folder(tiny_models: Path) -> Path:
    return tiny_models / "decoder"
