"""Which weights a folder holds, told without reading them all."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from kandinsky_dist.models.architectures import COMPONENTS
from kandinsky_dist.models.load import weight_files

NUM_BLOCKS, BLOCK_BYTES = 256, 4096
"""What `weights_fingerprint` reads of a file: 1 MiB, whatever its size."""


def weights_fingerprint(folder: Path, components: Sequence[str]) -> str:
    """Sha256 over some components' weight files: their sizes, and blocks of each from the first to the last.

    Cheap for files of any size. Two trainings or two random initialisations differ; a change of a few values
    may go unseen.

    Args:
        folder: pipeline folder, as `pipeline_folder` returned it.
        components: those with weights; names that no pipeline knows are networks of diffusers.
    """
    digest = hashlib.sha256()
    libraries = {name: item[0] for stage in COMPONENTS.values() for name, item in stage.items()}
    for component in components:
        for path in weight_files(folder / component, libraries.get(component, "diffusers"), str(folder)):
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{component} {size}\n".encode())
                for number in range(NUM_BLOCKS):
                    file.seek(max(0, size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
