import csv
import json
import logging

import pytest
from data_tars import picture

from kandinsky_dist.data.pack import pack
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import ConfigError, DataError


def packed(manifest):
    storage = LocalStorage(manifest)
    samples = [storage.read(shard, n) for shard, size in enumerate(manifest.shard_sizes) for n in range(size)]
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
    (source / "deep" / "b.v2.txt").write_text("second")
    (source / "no caption.png").write_bytes(picture(2))
    (source / "broken.png").write_bytes(b"not an image")
    (source / ".hidden.png").write_bytes(picture(3))
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, tmp_path / "out", samples_per_shard=1)
    assert packed(manifest) == {
        "a": {"jpg": picture(0, kind="JPEG"), "txt": b"first"},
        "deep/b_v2": {"webp": picture(1, kind="WEBP"), "txt": b"second"},
    }
    assert "1 that are not images (broken.png); 1 without a caption (no caption.png)" in caplog.text
    assert manifest.shard_sizes.tolist() == [1, 1]


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
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, tmp_path / "out", image_column="path" if column == "path" else None)
    assert packed(manifest) == {
        "x": {"png": picture(0), "txt": b"an x, with a comma"},
        "deep/x": {"png": picture(1), "txt": "ein Ö".encode()},
        "x-2": {"png": picture(0), "txt": b"another caption of it"},
    }
    assert "1 with a missing file (gone.png); 1 without a caption (deep/x.png)" in caplog.text


def test_wrong_columns_are_named(source, tmp_path):
    write_table(source, "jsonl", [{"file_name": "x.png", "caption": "x"}])
    with pytest.raises(
        ConfigError, match="has no column text; it has file_name, caption: give --caption-column"
    ):
        pack(source, tmp_path / "out")
    with pytest.raises(
        ConfigError, match="has no column url; it has file_name, caption: give --image-column"
    ):
        pack(source, tmp_path / "out", image_column="url", caption_column="caption")


@pytest.mark.parametrize("text", ['{"file_name": ', "[1]", "\udcff"])
def test_damaged_tables_are_one_line(source, tmp_path, text):
    (source / "metadata.jsonl").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(DataError, match=r"metadata\.jsonl") as caught:
        pack(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


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
    assert pack(source, tmp_path / "out") == first
    (source / "a.txt").write_text("longer than before")
    with pytest.raises(ConfigError, match="exists and was not made by this very command"):
        pack(source, tmp_path / "out")
