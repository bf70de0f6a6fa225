"""Where each file lies inside a tar, from its headers alone: payloads are never read.

Source: POSIX.1-2017, pax interchange format; GNU tar manual, "Basic Tar Format" (long names, base 256).
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from kandinsky_dist.errors import DataError

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)


@dataclass(frozen=True)
class Member:
    """A regular file of a tar; offset and size of its payload in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarTable:
    """All members of a tar in their order.

    `fingerprint` is a sha256 over names, offsets and sizes of the members, the tar's length and a CRC-32 of
    every header block (which hold modification times and modes). It changes when members are added, removed,
    renamed, reordered or resized and when the tar is packed anew from newer files. It does not see payload
    bytes that were overwritten in place with as many others: that would take reading everything.
    """

    members: tuple[Member, ...]
    num_bytes: int
    fingerprint: str


def walk_tar(path: Path) -> TarTable:
    """Reads the member table of an uncompressed tar: ustar, pax, GNU or v7.

    Raises:
        DataError: not a tar, compressed, cut short, or with sparse members.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _walk(file.fileno(), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _walk(descriptor: int, path: Path) -> TarTable:
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes == 0:
        raise DataError(f"{path} is not a tar: the file is empty; write the shard again")
    digest = hashlib.sha256()
    headers_crc = 0
    members: list[Member] = []
    position = 0
    shared: dict[str, str] = {}  # of global pax headers
    override: dict[str, str] = {}  # of the header before a member: long name, pax path and size
    while True:
        header = os.pread(descriptor, BLOCK_BYTES, position)
        if header == ZERO_BLOCK:
            break
        if len(header) < BLOCK_BYTES:
            raise DataError(
                f"{path} is cut short: {num_bytes} bytes and no end-of-archive block; copy it again"
            )
        headers_crc = zlib.crc32(header, headers_crc)
        kind, size = _kind_and_size(header, path, position)
        payload = position + BLOCK_BYTES
        if kind in b"xgLK":
            text = os.pread(descriptor, size, payload)
            headers_crc = zlib.crc32(text, headers_crc)
            if kind == b"g"[0]:
                shared.update(_pax_records(text))
            elif kind == b"x"[0]:
                override.update(_pax_records(text))
            elif kind == b"L"[0]:
                override["path"] = _text(text)
        else:
            fields = {**shared, **override}
            override = {}
            if any(name.startswith("GNU.sparse.") for name in fields) or kind == b"S"[0]:
                raise DataError(
                    f"{path} has sparse members, which have no fixed place; pack it without --sparse"
                )
            if kind in b"0\x007":
                size = int(fields.get("size", size))
                name = fields.get("path") or _name(header)
                members.append(Member(name, payload, size))
                digest.update(f"{name}\0{payload}\0{size}\n".encode("utf-8", "surrogateescape"))
            elif kind in b"123456":
                size = 0  # links, devices, folders: no payload, whatever the field says
        position = payload + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if payload + size > num_bytes:
            raise DataError(
                f"{path} is cut short: {num_bytes} bytes, its member at {payload} ends at {payload + size}; "
                "copy it again"
            )
    digest.update(f"{num_bytes} {headers_crc}".encode())
    return TarTable(tuple(members), num_bytes, digest.hexdigest())


def _kind_and_size(header: bytes, path: Path, position: int) -> tuple[int, int]:
    """Type flag and payload size of a header whose checksum agrees."""
    try:
        expected = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        expected, size = -1, 0
    # The checksum counts its own field as blanks.
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected or size < 0:
        if position == 0:
            hint = (
                "it is compressed: gunzip it" if header[:2] == b"\x1f\x8b" else "give uncompressed .tar files"
            )
            raise DataError(f"{path} is not a tar ({hint})")
        raise DataError(f"{path} has a damaged header at byte {position}; copy it again")
    return header[156], size


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):  # base-256, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), ""
    if header[257:263] == b"ustar\0":  # GNU headers keep other things there
        prefix = _text(header[345:500])
    return f"{prefix}/{name}" if prefix else name


def _pax_records(text: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header."""
    records = {}
    while text.rstrip(b"\0"):
        length, _, _ = text.partition(b" ")
        record = text[len(length) + 1 : int(length) - 1]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        text = text[int(length) :]
    return records
