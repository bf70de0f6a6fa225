"""Where each file lies inside a tar, and what can be known of it without reading it whole.

Source: POSIX.1-2017, pax interchange format; GNU tar manual, "Basic Tar Format" (long names, base 256).
"""

import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from kandinsky_dist.data.indexing.image_size import large_images_are_fine, member_file, upright_size
from kandinsky_dist.data.indexing.tar_readers import DamagedShardError, Reader

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)
HEAD_BYTES, TAIL_BYTES = 4096, 512
"""What the fingerprint sees of each member: read by the way, with the headers around it."""
CHUNK_BYTES = 1 << 20
MAX_EXTENDED_BYTES = 16 << 20
"""Longest extended header (names and the like): a damaged size must not be taken for one."""
MAX_IMAGE_BYTES = 256 << 20
"""Longest image of a remote shard that is held in memory for its size in pixels."""


@dataclass(frozen=True)
class Member:
    """A regular file of a tar.

    Attributes:
        offset, size: of its payload, in bytes.
        checksum: CRC-32 of the payload, -1 if it was not read whole.
        width, height: of an image seen upright, in pixels; 0 of anything else.
    """

    name: str
    offset: int
    size: int
    checksum: int = -1
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class TarTable:
    """All members of a tar in their order.

    `fingerprint` is a sha256 over names, offsets and sizes of the members, a CRC-32 of the first 4,096 and
    the last 512 bytes of each, the tar's length and a CRC-32 of every header block (which hold modification
    times and modes). It does not depend on where the tar lies or on whether checksums were asked for.
    Bytes in the middle of a member that were overwritten with as many others are seen by checksums only.
    """

    members: tuple[Member, ...]
    num_bytes: int
    fingerprint: str


def walk_tar(
    reader: Reader, *, checksums: bool = False, is_image: Callable[[str], bool] = lambda name: False
) -> TarTable:
    """Reads the member table of an uncompressed tar: ustar, pax, GNU or v7.

    Args:
        reader: of the tar.
        checksums: read every byte; always so of a remote shard, which streams by anyway.
        is_image: whether a member of this name is an image whose size is wanted.

    Raises:
        DamagedShardError: not a tar, compressed, cut short, with damaged headers or sparse members.
    """
    with large_images_are_fine():
        return _walk(reader, checksums or reader.is_sequential, is_image)


def _walk(reader: Reader, checksums: bool, is_image: Callable[[str], bool]) -> TarTable:
    location, num_bytes = reader.location, reader.num_bytes
    if num_bytes == 0:
        raise DamagedShardError(f"{location} is not a tar: the file is empty; write the shard again")
    digest = hashlib.sha256()
    headers_crc = 0
    members: list[Member] = []
    position = 0
    shared: dict[str, str] = {}  # of global pax headers
    override: dict[str, str] = {}  # of the header before a member: long name, pax path and size
    while True:
        header = reader.read(position, BLOCK_BYTES)
        if header == ZERO_BLOCK:
            break
        if len(header) < BLOCK_BYTES:
            raise DamagedShardError(
                f"{location} is cut short: {num_bytes} bytes and no end-of-archive block; copy it again"
            )
        headers_crc = zlib.crc32(header, headers_crc)
        kind, size = _kind_and_size(header, location, position)
        payload = position + BLOCK_BYTES
        if kind in b"xgLK":
            _check_end(reader, payload, size)
            if size > MAX_EXTENDED_BYTES:
                raise _damaged(location, position)
            text = reader.read(payload, size)
            headers_crc = zlib.crc32(text, headers_crc)
            try:
                if kind == b"g"[0]:
                    shared.update(_pax_records(text))
                elif kind == b"x"[0]:
                    override.update(_pax_records(text))
                elif kind == b"L"[0]:
                    override["path"] = _text(text)
            except ValueError:
                raise _damaged(location, position) from None
        else:
            fields = {**shared, **override}
            override = {}
            if any(name.startswith("GNU.sparse.") for name in fields) or kind == b"S"[0]:
                raise DamagedShardError(
                    f"{location} has sparse members, which have no fixed place; pack it without --sparse"
                )
            name = fields.get("path") or _name(header)
            if kind in b"123456" or (kind == 0 and name.endswith("/")):
                size = 0  # links, devices, folders: no payload, whatever the field says
            elif kind in b"0\x007":
                if "size" in fields:
                    if not fields["size"].isdecimal():
                        raise _damaged(location, position)
                    size = int(fields["size"])
                _check_end(reader, payload, size)
                member, edges_crc = _member(reader, name, payload, size, checksums, is_image(name))
                members.append(member)
                digest.update(f"{name}\0{payload}\0{size}\0{edges_crc}\n".encode("utf-8", "surrogateescape"))
            _check_end(reader, payload, size)
        position = payload + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    digest.update(f"{num_bytes} {headers_crc}".encode())
    return TarTable(tuple(members), num_bytes, digest.hexdigest())


def _check_end(reader: Reader, payload: int, size: int) -> None:
    if payload + size > reader.num_bytes:
        raise DamagedShardError(
            f"{reader.location} is cut short: {reader.num_bytes} bytes, its member at {payload} ends at "
            f"{payload + size}; copy it again"
        )


def _damaged(location: str, position: int) -> DamagedShardError:
    return DamagedShardError(f"{location} has a damaged header at byte {position}; copy it again")


def _member(
    reader: Reader, name: str, offset: int, size: int, checksums: bool, is_image: bool
) -> tuple[Member, int]:
    """What is to be known of a member, and the CRC-32 of its head and tail."""
    head = reader.read(offset, min(size, HEAD_BYTES))
    checksum = -1
    chunks = [head]
    if checksums:
        checksum, done, tail = zlib.crc32(head), len(head), b""
        while done < size:
            chunk = reader.read(offset + done, min(CHUNK_BYTES, size - done))
            if not chunk:
                break
            checksum = zlib.crc32(chunk, checksum)
            if reader.is_sequential and is_image and size <= MAX_IMAGE_BYTES:
                chunks.append(chunk)
            tail = (tail + chunk if len(chunk) < TAIL_BYTES else chunk)[-TAIL_BYTES:]
            done += len(chunk)
    else:
        # Not before the image's header: the window that has the tail has the next member's header too.
        done, tail = size, b""
    width, height = 0, 0
    if is_image:
        file = io.BytesIO(b"".join(chunks)) if reader.is_sequential else member_file(reader, offset, size)
        width, height = upright_size(file)
    if not checksums and size > HEAD_BYTES:
        start = max(HEAD_BYTES, size - TAIL_BYTES)
        tail = reader.read(offset + start, size - start)
    if done < size or len(head) + len(tail) < min(size, HEAD_BYTES + TAIL_BYTES):
        raise DamagedShardError(f"{reader.location} became shorter while it was read; copy it again")
    return Member(name, offset, size, checksum, width, height), zlib.crc32(tail, zlib.crc32(head))


def _kind_and_size(header: bytes, location: str, position: int) -> tuple[int, int]:
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
            raise DamagedShardError(f"{location} is not a tar ({hint})")
        raise _damaged(location, position)
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
    """Records "LENGTH KEY=VALUE\\n" of a pax header.

    Raises:
        ValueError: they are not of this form.
    """
    records = {}
    while text.rstrip(b"\0"):
        length, _, _ = text.partition(b" ")
        end = int(length)
        record = text[len(length) + 1 : end - 1]
        key, equals, value = record.partition(b"=")
        if not equals or text[end - 1 : end] != b"\n":
            raise ValueError
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        text = text[end:]
    return records
