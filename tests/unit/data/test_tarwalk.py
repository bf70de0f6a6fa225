import io
import os
import tarfile
import zlib
from pathlib import Path

import pytest
from data_tars import picture, write_tar
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.indexing.samples import is_image
from kandinsky_dist.data.indexing.tar_readers import DamagedShardError, open_reader
from kandinsky_dist.data.indexing.tarwalk import TarTable, walk_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def walk(path: Path, **options) -> TarTable:
    with open_reader(str(path)) as reader:
        return walk_tar(reader, **options)


def as_tarfile_sees_it(path):
    with tarfile.open(path) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]


def as_we_see_it(path):
    return [(member.name, member.offset, member.size) for member in walk(path).members]


MEMBERS = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120),
        st.integers(0, 12_000),
        st.sampled_from(FORMATS[1:]),
        st.sampled_from(
            [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]
        ),
    ),
    max_size=6,
)


@given(members=MEMBERS)
@examples(40)
def test_any_mixture_of_formats_is_seen_as_tarfile_does(tmp_path_factory, members):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    data = b"".join(header_and_payload(f"x{name}", *rest) for name, *rest in members)
    path.write_bytes(data + bytes(1024))
    assert as_we_see_it(path) == as_tarfile_sees_it(path)
    whole = walk(path, checksums=True)
    assert whole.fingerprint == walk(path).fingerprint
    data += bytes(1024)
    for member in whole.members:
        assert member.checksum == zlib.crc32(data[member.offset : member.offset + member.size])
    assert all(member.checksum == -1 for member in walk(path).members)


def header_and_payload(name: str, size: int, tar_format: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    if kind not in (tarfile.DIRTYPE, tarfile.SYMTYPE):
        info.size = size
    payload = bytes(number % 251 for number in range(info.size))
    return info.tobuf(tar_format) + payload + bytes(-info.size % 512)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_long_names_folders_and_links(tmp_path, tar_format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("folder/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        archive.addfile(link)
        for name in ("a" * 90 + "/" + "b" * 90 + ".jpg", "plain.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    assert as_we_see_it(path) == as_tarfile_sees_it(path)
    assert len(as_we_see_it(path)) == 2


def test_sizes_beyond_octal_and_global_headers(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert as_we_see_it(path) == as_tarfile_sees_it(path)
    # A 9 GiB member in a sparse file: its size does not fit octal digits.
    big = tmp_path / "big.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    with open(big, "wb") as file:
        file.write(header)
        file.truncate(512 + info.size + 1024)
    assert as_we_see_it(big) == [("big.jpg", 512, 9 << 30)]


@pytest.mark.parametrize("cut_bytes", [1, 512, 4999, 5000, 5200])
def test_a_tar_cut_short_is_named(tmp_path, cut_bytes):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(600)), ("b.jpg", bytes(5000))])
    end = as_we_see_it(path)[-1]
    os.truncate(path, end[1] + end[2] - cut_bytes)
    with pytest.raises(DamagedShardError, match=r"a\.tar is cut short: \d+ bytes"):
        walk(path)


def test_a_missing_end_mark_means_cut_short(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(512))])
    os.truncate(path, 1024)
    with pytest.raises(DamagedShardError, match="no end-of-archive block"):
        walk(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"hello" * 300, "give uncompressed .tar files"),
        (b"\x1f\x8b\x08" + bytes(2000), "gunzip"),
    ],
)
def test_what_is_not_a_tar(tmp_path, data, words):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(DamagedShardError, match=rf"a\.tar is not a tar.*{words}"):
        walk(path)


def test_a_damaged_header_is_placed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(512)), ("b.jpg", bytes(512))])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedShardError, match="damaged header at byte 1024"):
        walk(path)


def test_fingerprint_tells_tables_apart(tmp_path):
    tables = [
        [("a.jpg", b"1"), ("b.jpg", b"2")],
        [("b.jpg", b"2"), ("a.jpg", b"1")],
        [("a.jpg", b"1"), ("c.jpg", b"2")],
        [("a.jpg", b"1"), ("b.jpg", b"22")],
        [("a.jpg", b"1")],
    ]
    prints = [walk(write_tar(tmp_path / f"{n}.tar", table)).fingerprint for n, table in enumerate(tables)]
    assert len(set(prints)) == len(prints)
    again = walk(write_tar(tmp_path / "elsewhere" / "x.tar", tables[0])).fingerprint
    assert again == prints[0]


def test_fingerprint_sees_other_content_of_equal_names_and_sizes(tmp_path):
    """What is seen by the way: the first 4,096 and the last 512 bytes of each member."""
    size = 20_000

    def printed(place, **options):
        data = bytearray(size)
        if place is not None:
            data[place] = 1
        path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(data)), ("a.txt", b"words")])
        return walk(path, **options).fingerprint

    blank = printed(None)
    assert all(printed(place) != blank for place in (0, 4095, size - 512, size - 1))
    assert printed(4096) == blank  # as the docstring says: only checksums see the middle
    for place in (None, 0, 10_000):
        assert printed(place) == printed(place, checksums=True)


def test_a_long_read_does_not_pass_the_window(tmp_path):
    """Members around the window's and the head's lengths, byte for byte."""
    members = [
        (f"{size}.bin", os.urandom(size)) for size in (0, 1, 511, 512, 4095, 4096, 4097, 4608, 8192, 70_000)
    ]
    path = write_tar(tmp_path / "a.tar", members)
    for (name, data), member in zip(members, walk(path, checksums=True).members, strict=True):
        assert (member.name, member.checksum) == (name, zlib.crc32(data))


def test_image_sizes_are_those_of_images_only(tmp_path):
    members = [
        ("a.PNG", picture(0, (30, 20))),
        ("a.txt", picture(1)),
        ("a.seg.png", picture(2)),
        ("b.jpg", b"?"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    for checksums in (False, True):
        table = walk(path, is_image=is_image, checksums=checksums)
        assert [(member.width, member.height) for member in table.members] == [
            (30, 20),
            (0, 0),
            (0, 0),
            (0, 0),
        ]


@pytest.mark.parametrize(
    "records",
    [
        b"nonsense",
        b"0 path=x\n",
        b"-3 a=b\n",
        b"999 path=x\n",
        b"11 path=xy",
        b"9 pathx\n\n",
        b"12 size=-500\n",
        b"9 size=x\n",
    ],
)
def test_damaged_pax_records_are_placed(tmp_path, records):
    """They have no checksum of their own: a flipped bit must neither crash nor loop for ever."""
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    path = tmp_path / "a.tar"
    path.write_bytes(
        header_and_payload("a", 5, tarfile.USTAR_FORMAT, tarfile.REGTYPE)
        + extended.tobuf(tarfile.USTAR_FORMAT)
        + records.ljust(512, b"\0")
        + header_and_payload("b", 5, tarfile.USTAR_FORMAT, tarfile.REGTYPE)
        + bytes(1024)
    )
    with pytest.raises(DamagedShardError, match="damaged header at byte"):
        walk(path)


@given(bit=st.integers(0, 8 * 512 - 1))
@examples(60)
def test_no_flipped_bit_of_a_header_goes_unseen(tmp_path_factory, bit):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    data = bytearray(
        header_and_payload("a.jpg", 700, tarfile.USTAR_FORMAT, tarfile.REGTYPE)
        + header_and_payload("b.jpg", 700, tarfile.USTAR_FORMAT, tarfile.REGTYPE)
        + bytes(1024)
    )
    path.write_bytes(data)
    whole = outcome(path)
    data[3 * 512 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert outcome(path) != whole  # nearly always damage; the checksum's own padding only changes the print


def outcome(path: Path) -> str:
    """The fingerprint, or what is wrong."""
    try:
        return walk(path).fingerprint
    except DamagedShardError as error:
        return str(error)
