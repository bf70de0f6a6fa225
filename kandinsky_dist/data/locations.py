"""Where files lie: a local path or a URL, as text, relative to a root or on its own."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

REMOTE = re.compile(r"(https?|s3)://")


def is_remote(location: str) -> bool:
    """Whether it is read over the network."""
    return REMOTE.match(location) is not None


def join(root: str, location: str) -> str:
    """A location that may be relative to a root."""
    if is_remote(location) or os.path.isabs(location):
        return location
    return f"{root.rstrip('/')}/{location}" if is_remote(root) else os.path.join(root, location)


def relative(location: str, root: Path) -> str:
    """A local location as seen from a folder, so that the two can be moved together; a URL as it is."""
    return location if is_remote(location) else Path(os.path.relpath(location, root)).as_posix()


def base_name(location: str) -> str:
    """The last part, without what a URL may carry after a question mark."""
    path = location.partition("?")[0] if is_remote(location) else location
    return path.rstrip("/").rpartition("/")[2]


class Texts(Sequence[str]):
    """A column of strings in two arrays: a hundred thousand of them are read in one go and kept small."""

    def __init__(self, text_bytes: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text_bytes = text_bytes
        self.ends = ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Packs strings; names that are not UTF-8 come back as they were."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start = int(self.ends[index - 1]) if index else 0
        return self.text_bytes[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
