import io
import os
import tarfile

import pytest
from data_tars import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky_dist.data.tarwalk import walk_tar
from kandinsky_dist.errors import DataError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def as_tarfile_sees_it(path):
    with tarfile.open(path) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]


def as_we_see_it(path):
    return [(member.name, member.offset, member.size) for member in walk_tar(path).members]


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120), max_size=6
    ),
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
    tar_format=st.sampled_from(FORMATS[1:]),
)
@settings(max_examples=25, deadline=None)
def test_agrees_with_tarfile(tmp_path_factory, names, sizes, tar_format):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    members = [(f"x{name}", bytes(size)) for name, size in zip(names, sizes, strict=False)]
    write_tar(path, members, tar_format)
    assert as_we_see_it(path) == as_tarfile_sees_it(path)


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
    with pytest.raises(DataError, match=r"a\.tar is cut short: \d+ bytes"):
        walk_tar(path)


def test_a_missing_end_mark_means_cut_short(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(512))])
    os.truncate(path, 1024)
    with pytest.raises(DataError, match="no end-of-archive block"):
        walk_tar(path)


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
    with pytest.raises(DataError, match=rf"a\.tar is not a tar.*{words}"):
        walk_tar(path)


def test_a_damaged_header_is_placed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(512)), ("b.jpg", bytes(512))])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged header at byte 1024"):
        walk_tar(path)


def test_fingerprint_tells_tables_apart(tmp_path):
    tables = [
        [("a.jpg", b"1"), ("b.jpg", b"2")],
        [("b.jpg", b"2"), ("a.jpg", b"1")],
        [("a.jpg", b"1"), ("c.jpg", b"2")],
        [("a.jpg", b"1"), ("b.jpg", b"22")],
        [("a.jpg", b"1")],
    ]
    prints = [walk_tar(write_tar(tmp_path / f"{n}.tar", table)).fingerprint for n, table in enumerate(tables)]
    assert len(set(prints)) == len(prints)
    again = walk_tar(write_tar(tmp_path / "elsewhere" / "x.tar", tables[0])).fingerprint
    assert again == prints[0]
