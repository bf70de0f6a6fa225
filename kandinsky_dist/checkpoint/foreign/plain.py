"""Files of torch.save that others wrote, of which nothing but tensors and plain values is read."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.errors import CheckpointError


def load_plain(path: Path) -> Any:
    """What is in a file of torch.save; its tensors are mapped, and read when they are used.

    No code in the file is run: a pickle of any other object is refused.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        found = str(error).partition("Unsupported global: GLOBAL ")[2].split() or ["a pickle"]
        raise CheckpointError(
            f"{path} holds objects beside tensors and numbers ({found[0]}), which are never read"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged, or no file of torch.save: {reason}") from error


def flat(tensor: Any, where: str) -> Tensor:
    """A tensor's values in their logical order, 1-D; refuses what is none or has no real values.

    Raises:
        CheckpointError: it is no floating-point tensor.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise CheckpointError(f"{where} is no tensor of real numbers")
    return tensor.detach().flatten()
