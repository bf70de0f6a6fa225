import csv
import json
import logging
import os
import tracemalloc

import pytest
from data_tars import picture
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.packing.pack import Columns, open_source, pack
from kandinsky_dist.data.packing.unique_keys import UniqueKeys
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import ConfigError, DataError


def packed(manifest):
    storage = LocalStorage(manifest)
    sizes = manifest.num_samples_S.tolist()
    samples = [storage.read(Place(shard, n)) for shard, size in enumerate(sizes) for n in range(size)]
    return {sample.key: dict(sample.members) for sample in samples}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    return folder


def test_images_beside_captions(source, tmp_path, caplog):
    (source / "a.JPG").write_bytes(picture(0, kind="JPEG"))
    (source / "a.txt").write_text(" first \n")
    (source / "deep" / "b.v2.webp").write_bytes(picture(1, kind="WEBP"))
    (source / "deep" / "b.v2.txt").write_text("second", "utf-8-sig")
    (source / "no caption.png").write_bytes(picture(2))
    (source / "broken.png").write_bytes(b"not an image")
    (source / "latin.png").write_bytes(picture(4))
    (source / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / ".hidden.png").write_bytes(picture(3))
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, tmp_path / "out", samples_per_shard=1)
    assert packed(manifest) == {
        "a": {"jpg": picture(0, kind="JPEG"), "txt": b"first"},
        "deep/b_v2": {"webp": picture(1, kind="WEBP"), "txt": b"second"},
    }
    assert (
        "1 that are no JPEG, PNG, WebP, BMP, GIF or TIFF (broken.png); "
        "1 whose caption is not UTF-8 (latin.png); "
        "1 without a caption (no caption.png)" in caplog.text
    )
    assert manifest.num_samples_S.tolist() == [1, 1]


def test_files_as_img2dataset_leaves_them(source, tmp_path, caplog):
    """Images with .txt and .json in numbered folders; parquet files beside them have no images."""
    (source / "deep" / "000000001.jpg").write_bytes(picture(0, kind="JPEG"))
    (source / "deep" / "000000001.txt").write_text("a")
    (source / "deep" / "000000001.json").write_text(
        json.dumps({"caption": "a", "other": ["b", "c"], "url": "u", "ä": None})
    )
    (source / "deep" / "000000002.jpg").write_bytes(picture(1, kind="JPEG"))
    (source / "deep" / "000000002.txt").write_text("b")
    (source / "deep" / "000000003.jpg").write_bytes(picture(2, kind="JPEG"))
    (source / "deep" / "000000003.txt").write_text("c")
    (source / "deep" / "000000003.json").write_text("{cut")
    (source / "zz.parquet").write_bytes(b"PAR1, as far as anybody looks")
    with caplog.at_level(logging.WARNING):
        samples = packed(pack(source, tmp_path / "out", columns=Columns(keep=("other", "ä"))))
    assert [json.loads(members["json"]) for members in samples.values()] == [
        {"other": ["b", "c"], "ä": None},
        {},
    ]
    assert "1 with a damaged .json (deep/000000003.jpg)" in caplog.text
    assert "json" not in packed(pack(source, tmp_path / "plain"))["deep/000000001"]


def rows():
    return [
        {"file_name": "x.png", "text": "an x, with a comma"},
        {"file_name": "deep/x.png", "text": "ein Ö"},
        {"file_name": "x.png", "text": "another caption of it"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "deep/x.png", "text": ""},
    ]


def write_table(folder, kind, table):
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)), "utf-8")
    else:
        with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_tables(source, tmp_path, kind, column, caplog):
    (source / "x.png").write_bytes(picture(0))
    (source / "deep" / "x.png").write_bytes(picture(1))
    write_table(source, kind, [{column: row["file_name"], "text": row["text"]} for row in rows()])
    columns = Columns(image="path" if column == "path" else None)
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, tmp_path / "out", columns=columns)
    assert packed(manifest) == {
        "x": {"png": picture(0), "txt": b"an x, with a comma"},
        "deep/x": {"png": picture(1), "txt": "ein Ö".encode()},
        "x-2": {"png": picture(0), "txt": b"another caption of it"},
    }
    assert "1 with a missing file (gone.png); 1 without a caption (deep/x.png)" in caplog.text


def test_captions_of_every_kind(source, tmp_path, caplog):
    """Of a list the first text; what is no text is left out; extra columns are kept as JSON."""
    table = [
        {"image": "a", "caption": ["", " first ", "second"], "score": float("nan")},
        {"image": "a", "caption": 7, "score": 1.5},
        {"image": "a", "caption": "\ud800", "score": 1.5},
        {"image": "a", "caption": None, "score": 1.5},
        {"image": "a\0b", "caption": "no such name", "score": 1.5},
        {"image": "\ud800", "caption": "no such name", "score": 1.5},
    ]
    (source / "a").write_bytes(picture(0, kind="GIF"))
    write_table(source, "jsonl", table)
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, tmp_path / "out", columns=Columns(keep=("caption", "score")))
    (members,) = packed(manifest).values()
    assert members["gif"] == picture(0, kind="GIF")
    assert members["txt"] == b"first"
    assert json.loads(members["json"]) == {"caption": ["", " first ", "second"], "score": None}
    assert (
        "1 whose caption is not a text (a); 1 whose caption is not UTF-8 (a); 1 without a caption (a); "
        "2 with a missing file" in caplog.text
    )


def test_few_of_many_left_out_are_named(source, tmp_path, caplog):
    (source / "a.png").write_bytes(picture(0))
    table = [{"file_name": "a.png", "text": "a"}] + [
        {"file_name": f"{n}.png", "text": "gone"} for n in range(9)
    ]
    write_table(source, "jsonl", table)
    with caplog.at_level(logging.WARNING):
        pack(source, tmp_path / "out")
    assert "left out: 9 with a missing file (0.png, 1.png, 2.png, ...)" in caplog.text


def test_wrong_columns_are_named(source, tmp_path):
    write_table(source, "jsonl", [{"file_name": "x.png", "title": "x"}])
    with pytest.raises(
        ConfigError, match="has no column text; it has file_name, title: give --caption-column"
    ):
        pack(source, tmp_path / "out")
    for columns, words in (
        (Columns("url", "title"), "has no column url; it has file_name, title: give --image-column"),
        (Columns(None, "title", ("author",)), "has no column author; .*: give --keep-columns"),
    ):
        with pytest.raises(ConfigError, match=words):
            pack(source, tmp_path / "out", columns=columns)
    with pytest.raises(ConfigError, match=r"--split train: .* is not a dataset with splits"):
        pack(source, tmp_path / "out", split="train")
    with pytest.raises(ConfigError, match="--subset de is for datasets of the hub"):
        pack(source, tmp_path / "out", subset="de")
    (source / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"--caption-column title: .* has no table"):
        pack(source, tmp_path / "out", columns=Columns(caption="title"))


@pytest.mark.parametrize("text", ['{"file_name": ', "[1]", "\udcff"])
def test_damaged_tables_are_one_line(source, tmp_path, text):
    (source / "metadata.jsonl").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(DataError, match=r"metadata\.jsonl") as caught:
        pack(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_table_that_breaks_off_leaves_nothing(source, tmp_path):
    (source / "a.png").write_bytes(picture(0))
    write_table(source, "jsonl", [{"file_name": "a.png", "text": "a"}])
    with open(source / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "a.p')
    with pytest.raises(DataError, match=r"metadata\.jsonl cannot be read"):
        pack(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_nothing_usable(source, tmp_path):
    with pytest.raises(DataError, match="no image with a caption; it has no image files"):
        pack(source, tmp_path / "out")
    (source / "a.png").write_bytes(picture(0))
    with pytest.raises(DataError, match=r"no image with a caption; left out: 1 without a caption \(a\.png\)"):
        pack(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a folder"):
        pack(source / "a.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_again_is_kept_until_the_source_changes(source, tmp_path):
    (source / "a.png").write_bytes(picture(0))
    (source / "a.txt").write_text("first")
    first = pack(source, tmp_path / "out")
    assert pack(source, tmp_path / "out").fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="exists and was not made by this very command"):
        pack(source, tmp_path / "out", columns=Columns(keep=("b",)))
    (source / "a.txt").write_text("longer than before")
    with pytest.raises(ConfigError, match="exists and was not made by this very command"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_changed_image_of_a_table_is_seen(source, tmp_path, kind):
    (source / "x.png").write_bytes(picture(0))
    write_table(source, kind, [{"file_name": "x.png", "text": "x"}])
    pack(source, tmp_path / "out")
    pack(source, tmp_path / "out")
    (source / "x.png").write_bytes(picture(0, size=(9, 9)))
    with pytest.raises(ConfigError, match="exists and was not made by this very command"):
        pack(source, tmp_path / "out")


ROW_MAKERS = ("*/data/packing/pack*.py", "*/json/*.py", "*/csv.py", "<frozen codecs>")


def held_bytes(source):
    """What code that makes rows holds at the last one. Not all memory: interpreter-wide tables grow too."""
    opened = open_source(source, Columns())
    opened.content()
    tracemalloc.start()
    for number, _row in enumerate(opened.rows(), 1):
        if number == opened.num_rows:
            taken = tracemalloc.take_snapshot()
    tracemalloc.stop()
    makers = [tracemalloc.Filter(True, name) for name in ROW_MAKERS]
    return sum(trace.size for trace in taken.filter_traces(makers).traces)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_a_table_are_not_held(source, kind):
    held = []
    for num_rows in (200, 4000):
        write_table(source, kind, [{"file_name": f"{n}.png", "text": "x" * 100} for n in range(num_rows)])
        held.append(held_bytes(source))
    assert held[0] > 0
    assert held[1] < held[0] + 40_000, held  # 3,800 rows more, of 100 bytes and more each


@examples(60)
@given(st.lists(st.text("ab-12./_\ud800", max_size=5), max_size=40))
def test_keys_are_unique_and_can_be_keys(names):
    class Small(UniqueKeys):
        NUM_BITS = 512  # nearly full with these: wrong answers come often, a key twice never

    for make in (UniqueKeys, Small):
        keys = make()
        given_keys = [keys.of(name) for name in names]
        assert len(set(given_keys)) == len(names), given_keys
        for key in given_keys:
            assert key, given_keys
            assert not key.startswith("/"), given_keys
            assert "." not in key.rpartition("/")[2], given_keys
            assert not any(part == ".." for part in key.split("/")), given_keys


def test_keys_of_one_name_do_not_cost_their_number_squared():
    keys = UniqueKeys()
    asked = []
    may_be_taken = keys._may_be_taken
    keys._may_be_taken = lambda key: asked.append(key) or may_be_taken(key)
    assert len({keys.of("placeholder.png") for _ in range(2000)}) == 2000
    assert len(asked) < 2000 * 20


def test_names_that_readers_pass_over_are_packed_under_others(source, tmp_path):
    (source / "__mine__").mkdir()
    (source / "__mine__" / "a.png").write_bytes(picture(0))
    (source / "__mine__" / "a.txt").write_text("a")
    assert list(packed(pack(source, tmp_path / "out"))) == ["_mine_/a"]
