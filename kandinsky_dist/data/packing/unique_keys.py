"""Keys for samples, from names that may come twice."""

import hashlib
import mmap
import re
from pathlib import PurePosixPath


class UniqueKeys:
    """Keys of samples from the names of their images, no two alike, in memory that does not grow.

    A name that may have been given before gets a number. A Bloom filter says which ones may: it never misses
    one. Taken for known by mistake are one in ten thousand of 10^7 names and one in fifty of 10^8; all that
    comes of it is a number that was not needed.
    """

    NUM_BITS = 2**29
    NUM_HASHES = 3

    NUM_SMALL = 16

    def __init__(self) -> None:
        self._bits = mmap.mmap(-1, self.NUM_BITS // 8)  # 64 MiB, of which the system gives what is touched
        self._num_keys = 0

    def of(self, name: str) -> str:
        """The path without extension, and without dots in its last part, where a key ends."""
        # Parts like __this__ are notes of WebDataset's own, which readers pass over.
        parts = [re.sub(r"^__(.*)__$", r"_\1_", part, flags=re.DOTALL) for part in PurePosixPath(name).parts]
        parts = [part for part in parts if part != ".." and not part.startswith("/")]
        path = PurePosixPath(*parts)
        plain = str(path.with_name(path.stem.replace(".", "_") or "_")) if path.name else "_"
        self._num_keys += 1
        key, number = plain, 1
        while self._may_be_taken(key):
            # A name that comes a million times must not be counted up from 1 a million times.
            number = max(number, self._num_keys) + 1 if number == self.NUM_SMALL else number + 1
            key = f"{plain}-{number}"
        return key

    def _may_be_taken(self, key: str) -> bool:
        """Whether a key may have been asked for before; it has been, then."""
        digest = hashlib.blake2b(
            key.encode("utf-8", "surrogatepass"), digest_size=8 * self.NUM_HASHES
        ).digest()
        is_taken = True
        for start in range(0, len(digest), 8):
            byte, bit = divmod(int.from_bytes(digest[start : start + 8], "little") % self.NUM_BITS, 8)
            is_taken = is_taken and bool(self._bits[byte] >> bit & 1)
            self._bits[byte] |= 1 << bit
        return is_taken
