"""Images inside tables: parquet files and what the `datasets` package writes."""

import json
import logging
import tracemalloc

import numpy as np
import pytest
from data_tars import picture
from test_pack import packed

from kandinsky_dist.data.packing.pack import Columns, open_source, pack
from kandinsky_dist.data.packing.pack_arrow import HubDataset
from kandinsky_dist.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def test_parquet_with_bytes(tmp_path, caplog):
    """As img2dataset writes it: a column of bytes, a null where a download failed."""
    images = [picture(n, kind="JPEG") for n in range(3)]
    write_parquet(
        tmp_path / "in" / "00000.parquet",
        {
            "jpg": [images[0], None, images[1]],
            "caption": ["a", "b", " c "],
            "url": ["u", "v", "w"],
            "score": [0.5, 1.0, np.nan],
        },
    )
    write_parquet(
        tmp_path / "in" / "deep" / "00001.parquet",
        {"caption": ["d", ""], "jpg": [images[2]] * 2, "url": ["x"] * 2, "score": [2.0] * 2},
    )
    with caplog.at_level(logging.WARNING):
        manifest = pack(tmp_path / "in", tmp_path / "out", columns=Columns(keep=("url", "score")))
    samples = packed(manifest)
    assert [(key, members["jpg"], members["txt"]) for key, members in samples.items()] == [
        ("000000000", images[0], b"a"),
        ("000000002", images[1], b"c"),
        ("000000003", images[2], b"d"),
    ]
    assert [json.loads(members["json"]) for members in samples.values()] == [
        {"url": "u", "score": 0.5},
        {"url": "w", "score": None},
        {"url": "x", "score": 2.0},
    ]
    assert "1 with a missing file (000000001); 1 without a caption (000000004)" in caplog.text
    assert pack(tmp_path / "in", tmp_path / "out", columns=Columns(keep=("url", "score"))).num_samples == 3


def test_parquet_with_the_struct_of_datasets(tmp_path):
    """Bytes or, where there are none, a path; the format is told from the bytes."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.png").write_bytes(picture(1))
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        {"bytes": picture(0, kind="WEBP"), "path": "a"},
        {"bytes": None, "path": "deep/b.png"},
        {"bytes": None, "path": "gone.png"},
        None,
    ]
    captions = pa.array([["", "one"], ["two"], ["three"], ["four"]])
    write_parquet(tmp_path / "x.parquet", {"image": pa.array(values, kinds), "text": captions})
    samples = packed(pack(tmp_path / "x.parquet", tmp_path / "out"))
    assert samples == {
        "000000000": {"webp": picture(0, kind="WEBP"), "txt": b"one"},
        "000000001": {"png": picture(1), "txt": b"two"},
    }


def test_columns_that_cannot_be_meant(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, {"image": [1], "text": [1], "blob": [b""], "caption": ["a"]})
    cases = [
        (Columns(), "column image holds int64, not bytes"),
        (Columns("blob"), "column text holds int64, not text; give --caption-column"),
        (Columns("blob", "caption", ("image", "blob")), "column blob holds bytes, which a .json cannot"),
        (Columns("nothing"), "has no column nothing; it has image, text, blob, caption: give --image-column"),
    ]
    for columns, words in cases:
        with pytest.raises(ConfigError, match=words):
            pack(file, tmp_path / "out", columns=columns)
    write_parquet(tmp_path / "many" / "0.parquet", {"image": [b""], "text": ["a"]})
    write_parquet(tmp_path / "many" / "1.parquet", {"image": [b""], "caption": ["a"]})
    with pytest.raises(ConfigError, match=r"1\.parquet has no column text"):
        pack(tmp_path / "many", tmp_path / "out")


def test_damaged_parquet_is_one_line(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, {"image": [picture(0)], "text": ["a"]}, compression="none")
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-3])
    with pytest.raises(DataError, match="is not a whole parquet file") as caught:
        pack(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    data[4:40] = b"\xff" * 36
    file.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read") as caught:
        pack(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rows_of_parquet_are_not_held(tmp_path):
    """Nor is a row group, however large: here all images are in one, in pages of 16."""
    options = {"row_group_size": 2000, "write_batch_size": 16}
    peaks = []
    for num_rows in (200, 2000):
        images = [np.random.default_rng(n).bytes(20_000) for n in range(num_rows)]
        write_parquet(tmp_path / "x.parquet", {"image": images, "text": ["a"] * num_rows}, **options)
        del images
        opened = open_source(tmp_path / "x.parquet", Columns())
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        most = max(pa.total_allocated_bytes() - before for _ in opened.rows())
        peaks.append(most + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 10e6, peaks  # of 40 MB


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "image": [{"bytes": picture(n, kind="JPEG"), "path": None} for n in range(5)],
        "text": [f"caption {n}" for n in range(5)],
        "kind": [n % 2 for n in range(5)],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    dataset.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([4, 1])}).save_to_disk(folder / "splits")
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "train-00000.parquet")
    return folder


def expected(*numbers):
    return [{"jpg": picture(n, kind="JPEG"), "txt": f"caption {n}".encode()} for n in numbers]


def test_dataset_on_disk(saved, tmp_path):
    manifest = pack(saved / "one", tmp_path / "one", samples_per_shard=3)
    assert list(packed(manifest).values()) == expected(*range(5))
    assert manifest.num_samples_S.tolist() == [3, 2]
    assert pack(saved / "one", tmp_path / "one", samples_per_shard=3).fingerprint == manifest.fingerprint
    assert list(packed(pack(saved / "splits", tmp_path / "test", split="test")).values()) == expected(4, 1)
    labelled = packed(pack(saved / "one", tmp_path / "kind", columns=Columns(caption="kind", keep=("text",))))
    assert [members["txt"] for members in labelled.values()] == [b"cat", b"dog", b"cat", b"dog", b"cat"]


def test_splits_are_chosen_not_guessed(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"no --split given: .* has train, test; give one of them"):
        pack(saved / "splits", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--split valid: .* has train, test; give one of them"):
        pack(saved / "splits", tmp_path / "out", split="valid")
    with pytest.raises(ConfigError, match=r"--split test: .* is one dataset without splits"):
        pack(saved / "one", tmp_path / "out", split="test")


def test_damaged_dataset_is_one_line(saved, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "in" / name).write_bytes((saved / "one" / name).read_bytes())
    with pytest.raises(DataError, match="cannot be read as a saved dataset") as caught:
        pack(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_datasets_can_load_is_streamed(saved):
    """The hub's way, without a network: `datasets` takes a local folder by the same call."""
    source = HubDataset(str(saved / "parquet"), Columns(keep=("kind",)), None, None)
    rows = list(source.rows())
    assert [row.image for row in rows] == [picture(n, kind="JPEG") for n in range(5)]
    assert [row.name for row in rows] == [f"00000000{n}" for n in range(5)]
    assert rows[3].caption == "caption 3"
    assert rows[3].kept == {"kind": 1}
    assert source.content() == HubDataset(str(saved / "parquet"), Columns(), "train", None).content()
    with pytest.raises(ConfigError, match=r"--split test: .* has train; give one of them"):
        HubDataset(str(saved / "parquet"), Columns(), "test", None)
