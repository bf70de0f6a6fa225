"""The loader benches run, leave a record and render it. What they measure is not judged here."""

import json
import os
from pathlib import Path

import pytest
from helpers import servers
from helpers.campaign import cases
from helpers.forked import command

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.data_contenders import JPEG_SHARDS

pytestmark = pytest.mark.integration


# Photographs are decoded in the fast suite by test_bench_remote.
@pytest.mark.parametrize("forms", cases([["cached"], ["cached", "jpeg"]], lambda forms: len(forms) == 1))
def test_bench_data(forms, tmp_path):
    done = command(
        "bench", "data", tmp_path, "--repeats", 1, "--seconds", 0.1, "--num-samples-cached", 512,
        "--num-samples-jpeg", 32, "--form", *forms, "--contender", "kandinsky-dist", "bare pread", "litdata",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert {row["form"] for row in rows} == set(forms)
    for row in rows:
        measured = row["note"] == "" and len(row["repeats"]) == 1 and row["samples_per_second"] > 0
        assert measured or (row["contender"], row["note"]) == ("litdata", "not installed"), row
    page = (tmp_path / "data.md").read_text()
    assert to_markdown(tmp_path / "data.json") == page
    assert "times the bare reads of the same bytes" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "data.md"]


def test_no_such_contender(tmp_path):
    done = command("bench", "data", tmp_path, "--contender", "nobody")
    assert done.returncode == 78
    assert done.stderr.startswith("no contender is named nobody; there are: bare pread, ")


def upload(folder: Path, bucket: str, endpoint: str) -> str:
    """Puts a shard folder into a new bucket and returns its URL."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), bucket, f"{folder.name}/{path.name}")
    return f"s3://{bucket}/{folder.name}/"


def test_bench_remote(tmp_path):
    shards = tmp_path / "shards"
    JPEG_SHARDS.write(shards, 16)
    with servers.s3_server() as endpoint:
        url = upload(shards, "corpora", endpoint)
        credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        done = command(
            "bench", "remote", tmp_path / "out", "--local", shards, "--remote", url, "--repeats", 1,
            "--seconds", 0.1, "--batch-size", 8, environment=credentials,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "data_remote.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["local", "remote"]
    assert all(row["samples_per_second"] > 0 for row in rows)
    page = (tmp_path / "out" / "data_remote.md").read_text()
    assert to_markdown(tmp_path / "out" / "data_remote.json") == page
    assert "times the same shards on a local disk" in page


def test_bench_resume(tmp_path):
    done = command("bench", "resume", tmp_path / "out", "--num-shards", 4, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "data_resume.json").read_text())["rows"]
    assert [row["position"] for row in rows] == [0, 4_000, 40_000 - 128]
    assert all(row["first_batch_seconds"] > row["plan_seconds"] > 0 for row in rows)
    page = (tmp_path / "out" / "data_resume.md").read_text()
    assert to_markdown(tmp_path / "out" / "data_resume.json") == page
