import io
import json
import os
import shutil

import numpy as np
import pytest
from data_tars import picture, sample, write_tar
from helpers.servers import http_server
from PIL import Image

from kandinsky_dist.data.checking import report as report_module
from kandinsky_dist.data.checking.report import check_shards
from kandinsky_dist.data.checking.report_text import tables_of, to_markdown, to_text
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.indexing.subset import make_subset
from kandinsky_dist.errors import ConfigError, DataError


def write(folder, shards, **options):
    for number, members in enumerate(shards):
        write_tar(folder / f"{number}.tar", members)
    return index_shards(str(folder), progress=False, **options)


def check(folder, **options):
    return check_shards(str(folder), **{"resolution": 32, "num_processes": 1, "progress": False, **options})


@pytest.fixture
def corpus(tmp_path):
    """Nine samples in two shards; 3 and 4 have 0's picture, 6 has 5's caption."""
    shards = [
        [*sample(0), *sample(1), *sample(2), *sample(3, png=picture(0)), *sample(4, png=picture(0))],
        [
            *sample(5),
            *sample(6, txt=b"caption 5"),
            *sample(7, png=picture(7, (40, 80)), txt="größer".encode()),
            *sample(8, png=picture(8, (64, 32)), txt=b""),
            ("lonely.txt", b"no image"),
        ],
    ]
    write(tmp_path / "corpus", shards, checksums=True)
    return tmp_path / "corpus"


def test_figures(corpus):
    report = check(corpus)
    figures = report.figures()
    assert report.problem == ""
    sizes = [len(picture(n)) for n in (0, 1, 2, 0, 0, 5, 6)]
    sizes += [len(picture(7, (40, 80))), len(picture(8, (64, 32)))]
    spread = figures["image_file_bytes"]
    assert (spread["count"], spread["min"], spread["max"]) == (9, min(sizes), max(sizes))
    assert spread["mean"] == round(np.mean(sizes), 2)
    assert spread["p50"] == pytest.approx(np.median(sizes), rel=0.016)
    assert figures["image_short_side_pixels"] == {
        "count": 9, "mean": 20.44, "min": 16, "p5": 16, "p50": 16, "p95": 40, "max": 40,
    }  # fmt: skip
    assert figures["image_long_side_pixels"]["max"] == 80
    assert figures["num_images_smaller_than_resolution"] == 7
    aspects = {name: count for name, count in figures["num_samples_by_aspect"].items() if count}
    assert aspects == {"3:2": 7, "1:2": 1, "2:1": 1}
    assert figures["num_members"] == {"png": 9, "txt": 9}
    assert figures["caption_bytes"]["max"] == 9
    assert figures["caption_characters"]["count"] == 9
    assert figures["num_empty_captions"] == 1
    assert figures["repeated_images"] == {
        "num_compared": 9, "num_repeated": 2, "most_alike": 3, "share": 2 / 9,
    }  # fmt: skip
    assert figures["repeated_captions"]["num_repeated"] == 1
    assert figures["num_left_out_by_indexing"] == {"image": 1, "caption": 0}
    assert figures["num_read"] == 9
    assert figures["estimated_epoch_seconds"] == pytest.approx(9 / report.samples_per_second)


def test_captions_by_characters_and_tokens(corpus):
    report = check(corpus, count_tokens=lambda captions: [77 + ("5" in text) for text in captions])
    figures = report.figures()
    lengths = [9, 9, 9, 9, 9, 9, 9, 6, 0]
    assert figures["caption_characters"]["mean"] == round(np.mean(lengths), 2)
    assert figures["caption_tokens"]["count"] == 9
    assert figures["share_of_captions_above_77_tokens"] == 2 / 9


def test_a_subset_is_read_evenly(tmp_path, monkeypatch):
    write(tmp_path / "corpus", [[*sample(2 * n), *sample(2 * n + 1)] for n in range(6)])
    read = []
    use = report_module.Surveyor._use

    def noting(self, place, position, findings):
        read.append((place.shard, place.index, position))
        use(self, place, position, findings)

    monkeypatch.setattr(report_module.Surveyor, "_use", noting)
    assert check(tmp_path / "corpus", num_read=3).findings.num_read == 3
    assert read == [(1, 0, 2), (3, 0, 6), (5, 0, 10)]
    read.clear()
    assert check(tmp_path / "corpus", num_read=0).figures()["estimated_epoch_seconds"] is None
    assert read == []
    check(tmp_path / "corpus", num_read=None)
    assert [position for _, _, position in read] == list(range(12))


def test_unreadable_samples_are_named_by_reason(tmp_path):
    jpeg = picture(4, (64, 64), kind="JPEG")
    members = [
        *sample(0),
        *sample(1, png=b"GIF"),
        *sample(2, txt=b"\xff"),
        *sample(3, png=picture(3, (64, 64))[:-2000]),
        ("00004.jpg", jpeg[: len(jpeg) // 2]),
        ("00004.txt", b"half"),
        *sample(5, png=b"no image either"),
    ]
    write(tmp_path / "corpus", [members])
    report = check(tmp_path / "corpus", out=tmp_path / "out")
    assert report.reasons == {"not an image": 2, "image damaged": 2, "caption not UTF-8": 1}
    assert report.problem.startswith(
        "5 of 6 samples that were read cannot be used, first 0.tar:00001: cannot be decoded as an image"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines] == [("0.tar", f"0000{n}") for n in range(1, 6)]
    assert {line["reason"] for line in lines} == set(report.reasons)
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["unreadable"]["not an image"]["num_samples"] == 2
    assert "| unreadable | 5 |" in (tmp_path / "out" / "report.md").read_text()


def flip_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_shards_that_are_not_what_was_indexed(tmp_path):
    folder = tmp_path / "corpus"
    manifest = write(folder, [sample(n) for n in range(7)], checksums=True)
    (folder / "1.tar").unlink()
    with open(folder / "2.tar", "ab") as file:
        file.write(bytes(512))
    flip_byte(folder / "3.tar", 512)  # the first byte of the first member: only times and bytes tell
    shutil.copy(folder / "5.tar.idx", folder / "4.tar.idx")
    os.utime(folder / "5.tar", ns=(1, 1))  # copied about, but the same
    (folder / "6.tar").write_bytes(b"no tar" * 100 + bytes(int(manifest.num_bytes_S[6]) - 600))
    found = check(folder).findings.disagreeing
    assert [line.partition(str(folder))[2].split()[0] for line in found] == [
        "/1.tar:",
        "/2.tar",
        "/3.tar",
        "/4.tar.idx",
        "/6.tar",
    ]
    for line, words in zip(
        found, ("No such file", "bytes", "holds something else", "version", "tar"), strict=True
    ):
        assert words in line
    assert check(folder).problem.startswith("5 of 7 shards are not what was indexed, first ")


def test_changed_bytes_are_found_by_checksums(tmp_path):
    """In the middle of a member and with the old modification time, where only reading can find them."""
    folder = tmp_path / "corpus"
    big = picture(0, (128, 128), kind="BMP")
    write(folder, [[("a.bmp", big), ("a.txt", b"a")]], checksums=True)
    status = (folder / "0.tar").stat()
    flip_byte(folder / "0.tar", 512 + len(big) // 2)
    os.utime(folder / "0.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert check(folder, num_read=0).problem == ""
    assert check(folder).reasons == {"bytes changed since indexing": 1}


def test_a_part_of_a_corpus_counts_only_its_samples(corpus, tmp_path):
    make_subset(str(corpus), tmp_path / "part", min_side=20)
    figures = check(tmp_path / "part").figures()
    assert figures["num_samples"] == figures["num_read"] == figures["image_file_bytes"]["count"] == 2
    assert figures["image_short_side_pixels"]["min"] == 32


def test_encoder_outputs_need_no_image(tmp_path):
    write(
        tmp_path / "corpus", [[("a.cached", bytes(64)), ("b.cached", bytes(64)), *sample(1)]], checksums=True
    )
    report = check(tmp_path / "corpus")
    assert report.problem == ""
    assert report.findings.num_read == 3
    assert report.findings.image_bytes.count == 1


@pytest.mark.parametrize("is_index_local", [True, False])
def test_shards_on_a_server(corpus, tmp_path, is_index_local):
    with http_server(corpus) as server:
        shards = server.url
        if is_index_local:
            shards = str(tmp_path / "index")
            urls = f"{server.url}/{{0..1}}.tar"
            index_shards(urls, out=tmp_path / "index", progress=False, num_processes=1)
        figures = check(shards).figures()
        local = check(corpus).figures()
        for changing in ("shards", "read_samples_per_second_per_process", "estimated_epoch_seconds"):
            del figures[changing], local[changing]
        if is_index_local:
            del figures["fingerprint"], local["fingerprint"]
        assert figures == local
        (corpus / "0.tar").write_bytes((corpus / "1.tar").read_bytes())
        assert len(check(shards).findings.disagreeing) == 1


def test_captions_of_json(tmp_path):
    about = [{"long": "a longer text"}, {"long": ["", "x"]}, {"short": "none"}]
    members = []
    for number, fields in enumerate(about):
        members += [(f"{number}.png", picture(number)), (f"{number}.json", json.dumps(fields).encode())]
    write(tmp_path / "corpus", [members], captions=("json",))
    report = check(tmp_path / "corpus", captions=("json.long",))
    assert report.reasons == {"no caption": 1}
    assert report.figures()["caption_characters"]["max"] == len("a longer text")


def test_of_very_many_samples_some_kinds_are_compared(tmp_path, monkeypatch):
    """Copies stay together, so the share of repeated ones stays right."""
    monkeypatch.setattr(report_module, "MAX_COMPARED", 100)
    members = []
    for number in range(400):
        members += [(f"{number}.bmp", b"%d" % (number // 4)), (f"{number}.txt", b"a")]
    write(tmp_path / "corpus", [members], checksums=True)
    figures = check(tmp_path / "corpus", num_read=0).figures()
    assert figures["compared_one_in"] == 4
    assert 40 < figures["repeated_images"]["num_compared"] < 200
    assert figures["repeated_images"]["share"] == 0.75


def test_without_checksums_repeated_ones_are_unknown(tmp_path):
    write(tmp_path / "corpus", [sample(0)])
    report = check(tmp_path / "corpus")
    assert report.findings.num_unprinted == 1
    assert "repeated images" in to_text(tables_of(report.figures()))
    assert "unknown: index with --checksums" in to_text(tables_of(report.figures()))


def test_tables(corpus):
    text = to_text(tables_of(check(corpus).figures()))
    assert all(len(line) <= 130 for line in text.splitlines()), text
    for words in ("samples               9\n", "1 without image, first 1.tar:lonely", "3:2", "77.8%"):
        assert words in text
    markdown = to_markdown("a|b", tables_of(check(corpus).figures()))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert "| repeated images | 2 (22.2%), at most 3 alike; 9 compared by CRC-32 and size |" in rows


def test_picture(corpus, tmp_path):
    pytest.importorskip("matplotlib")
    check(corpus, out=tmp_path / "out")
    with Image.open(io.BytesIO((tmp_path / "out" / "report.png").read_bytes())) as image:
        assert image.size == (1440, 792)
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(100_000)}
    blue = colours.get((0x44, 0x77, 0xAA), 0)
    assert blue > 20_000, colours  # the bars of five panels


def test_wrong_numbers_and_nothing_there(corpus, tmp_path):
    for options, words in (
        ({"num_read": -1}, "sample=-1 must be at least 0"),
        ({"num_processes": 0}, "num_processes=0 must be at least 1"),
        ({"resolution": 0}, "resolution=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(corpus, **options)
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "nowhere")
