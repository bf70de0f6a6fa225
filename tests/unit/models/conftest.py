from pathlib import Path

import pytest
import torch

from kandinsky_dist.models.init import initialise


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny networks are slower on more threads, and other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of `models init --size tiny`; read only."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    assert initialise("tiny", out)
    return out


@pytest.fixture(scope="session")
def prior_folder(tiny_models: Path) -> Path:
    return tiny_models / "prior"


@pytest.fixture(scope="session")
def decoder_folder(tiny_models: Path) -> Path:
    return tiny_models / "decoder"
