"""The data commands, as a user types them."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from helpers import command, forked
from PIL import Image

from kandinsky_dist.data.catalogue import read_manifest

pytestmark = pytest.mark.integration


def run(*arguments):
    return forked.command("data", *arguments)


def errors(result):
    """What was said on stderr; progress bars are for terminals."""
    return result.stderr.splitlines()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        pixels = np.full((20, 30, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"grey {number}")
    return folder


def test_pack_then_index_agree(pictures, tmp_path):
    (pictures / "4.txt").unlink()
    packed = run("pack", pictures, tmp_path / "shards", "--samples-per-shard", 3)
    assert packed.returncode == 0, packed
    assert errors(packed) == ["left out: 1 without a caption (4.jpg)"]
    fingerprint = read_manifest(str(tmp_path / "shards")).fingerprint
    with tarfile.open(tmp_path / "shards" / "train-00001.tar") as archive:
        assert archive.getnames() == ["3.jpg", "3.txt"]
        assert archive.extractfile("3.jpg").read() == (pictures / "3.jpg").read_bytes()
    for path in (tmp_path / "shards").glob("*.idx"):
        path.unlink()
    indexed = run("index", tmp_path / "shards")
    assert indexed.returncode == 0, indexed
    assert indexed.stdout.startswith(f"4 samples in 2 shards, fingerprint {fingerprint[:16]}")
    assert read_manifest(str(tmp_path / "shards")).fingerprint == fingerprint


def test_pack_parquet_with_columns(pictures, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [(pictures / f"{number}.jpg").read_bytes() for number in range(5)]
    table = {"picture": images, "title": ["a", "b", "c", "d", "e"], "tags": [["x"], [], ["y", "z"], [], []]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    columns = ("--image-column", "picture", "--caption-column", "title", "--keep-columns", "tags", "title")
    packed = run("pack", tmp_path / "in.parquet", tmp_path / "shards", *columns)
    assert (packed.returncode, errors(packed)) == (0, []), packed
    with tarfile.open(tmp_path / "shards" / "train-00000.tar") as archive:
        assert archive.getnames()[6:9] == ["000000002.jpg", "000000002.json", "000000002.txt"]
        assert archive.extractfile("000000002.jpg").read() == images[2]
        assert json.load(archive.extractfile("000000002.json")) == {"tags": ["y", "z"], "title": "c"}
    again = run("pack", tmp_path / "in.parquet", tmp_path / "shards", *columns)
    assert again.returncode == 0, again
    assert errors(again) == [f"{tmp_path}/shards is already complete (5 samples): kept"]


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the hub's package is imported
    result = command.command("data", "pack", "nobody/nothing", tmp_path / "out")
    assert result.returncode == 78, result
    (line,) = errors(result)
    assert line.startswith("nobody/nothing is neither a path here nor a dataset that the hub gives: ")


def test_check_says_what_is_there_and_what_is_damaged(tmp_path, tiny_models):
    """With two processes, whose findings are put together."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(540):
        pixels = np.full((24, 24 + number % 7, 3), number % 250, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text("word " * (number % 90) + "end")
    assert run("pack", folder, tmp_path / "shards", "--samples-per-shard", 100).returncode == 0
    arguments = ("check", tmp_path / "shards", "--decode-all", "--num-processes", 2, "--resolution", 32)
    out = ("--out", tmp_path / "report", "--tokenizer", tiny_models / "prior")
    whole = command.command("data", *arguments, *out)  # really spawns its processes
    assert (whole.returncode, errors(whole)) == (0, []), whole
    assert "samples               540\n" in whole.stdout
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["num_read"] == figures["caption_tokens"]["count"] == 540
    assert figures["image_long_side_pixels"]["max"] == 30
    assert figures["share_of_captions_above_77_tokens"] == sum(n % 90 + 3 > 77 for n in range(540)) / 540
    names = ["report.json", "report.md", "report.png", "unreadable.jsonl"]
    assert sorted(os.listdir(tmp_path / "report")) == names
    with tarfile.open(tmp_path / "shards" / "train-00003.tar") as archive:
        offset = archive.getmember("320.png").offset_data
    with open(tmp_path / "shards" / "train-00003.tar", "r+b") as file:
        file.seek(offset + 40)
        file.write(b"damage")
    os.truncate(tmp_path / "shards" / "train-00005.tar", 512)
    damaged = run(*arguments, *out)
    assert damaged.returncode == 65, damaged
    (line,) = errors(damaged)
    assert line.startswith("2 of 6 shards are not what was indexed, first ")
    assert "train-00003.tar holds something else" in line
    assert "samples read" in damaged.stdout


def test_check_finds_changed_bytes_of_one_sample(pictures, tmp_path):
    assert run("pack", pictures, tmp_path / "shards").returncode == 0
    tar = tmp_path / "shards" / "train-00000.tar"
    with tarfile.open(tar) as archive:
        offset = archive.getmember("3.jpg").offset_data
    status = tar.stat()
    with open(tar, "r+b") as file:
        file.seek(offset + 100)
        file.write(b"damage")
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = run("check", tmp_path / "shards")
    assert result.returncode == 65, result
    (line,) = errors(result)
    assert line.startswith("1 of 5 samples that were read cannot be used, first train-00000.tar:3: ")
    assert "bytes changed since indexing" in result.stdout


def test_exit_codes_and_one_line(pictures, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tar").write_bytes(b"not a tar" * 200)
    cases = [
        (("pack", pictures, tmp_path / "full"), 78, "was not made by this very command"),
        (("pack", tmp_path / "nowhere", tmp_path / "out"), 78, "is not a folder"),
        (("pack", tmp_path / "full", tmp_path / "out"), 65, "it has no image files"),
        (("index", tmp_path / "nowhere"), 65, "does not exist"),
        (("check", tmp_path / "nowhere"), 65, "does not exist"),
        (("check", tmp_path / "full", "--tokenizer", tmp_path), 78, "it is not a CLIP tokenizer"),
        (("index", tmp_path / "broken"), 65, "a.tar is not a tar"),
    ]
    for arguments, code, words in cases:
        result = run(*arguments)
        assert result.returncode == code, result
        assert len(errors(result)) == 1, result.stderr
        assert words in errors(result)[0]


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_demo_from_the_real_packages(tmp_path):
    """Fetched over the network, or taken from the user's cache."""
    result = run("demo", tmp_path / "demo", "--image-size", 32, "--max-samples", 40)
    if result.returncode == 78 and "npm pack" in result.stderr:
        pytest.skip(f"no package registry: {errors(result)[-1]}")
    assert result.returncode == 0, result
    counts = [run("index", tmp_path / "demo" / split).stdout.split()[0] for split in ("train", "validation")]
    assert sum(map(int, counts)) == 40
    again = run("demo", tmp_path / "demo", "--image-size", 32, "--max-samples", 40)
    assert again.returncode == 0
    assert [line.partition(" is ")[2] for line in errors(again)] == [
        f"already complete ({count} samples): kept" for count in counts
    ]
