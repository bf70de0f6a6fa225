import base64
import gzip
import multiprocessing
import pickle
import random
import re
import socket
import threading
from dataclasses import replace

import pytest
from helpers.servers import Fault, aws_environment, delayed, http_server, s3_server

from kandinsky_dist.data.remote.fetch import Fetcher
from kandinsky_dist.data.remote.object_stream import Policy
from kandinsky_dist.errors import ConfigError, DataError

# Waits for an answer as long as the real one, for machines under load; only its pauses are shorter.
QUICK = Policy(attempts=4, base_seconds=0.001, cap_seconds=0.01, window_bytes=4096)
# Where a server is silent or drips.
IMPATIENT = replace(QUICK, window_seconds=0.25)
CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path


def fails(server, match, policy=QUICK, **arguments):
    with pytest.raises(DataError, match=match) as caught:
        Fetcher(policy).fetch(f"{server.url}/a.tar?signature=secret", 1000, 50_000, **arguments)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_ranges_and_whole_objects(folder):
    (folder / "empty.tar").write_bytes(b"")
    (folder / "a b%ü.tar").write_bytes(b"odd name")
    with http_server(folder) as server:
        fetcher = Fetcher(QUICK)
        url = f"{server.url}/a.tar"
        assert fetcher.fetch(url, 0, 1) == CONTENT[:1]
        assert fetcher.fetch(url, 1000, 100_000, expected_bytes=len(CONTENT)) == CONTENT[1000:101_000]
        assert fetcher.fetch(url, len(CONTENT) - 1, 1) == CONTENT[-1:]
        assert fetcher.fetch(url, 5, 0) == b""
        assert fetcher.fetch_whole(url) == CONTENT
        assert fetcher.fetch_whole(f"{server.url}/empty.tar") == b""
        assert fetcher.fetch_whole(f"{server.url}/a%20b%25%C3%BC.tar") == b"odd name"
        assert server.num_requests["a.tar"] == 4
        assert server.num_bytes["a.tar"] == 1 + 100_000 + 1 + len(CONTENT)


def test_stream_in_pieces(folder):
    with http_server(folder, [Fault(truncate_bytes=100_000)]) as server:
        stream = Fetcher(QUICK).open_stream(f"{server.url}/a.tar")
        assert (stream.num_bytes, len(stream.etag)) == (len(CONTENT), 32)
        pieces = [stream.read(70_001) for _ in range(6)]
        assert b"".join(pieces) == CONTENT
        assert [len(piece) for piece in pieces] == [70_001] * 4 + [len(CONTENT) - 4 * 70_001, 0]
        assert server.ranges == [("a.tar", ""), ("a.tar", "bytes=100000-299999")]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503, headers=(("Retry-After", "0"),)),
        Fault(status=429, headers=(("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)),
        Fault(status=408),
        Fault(is_silent=True),
        Fault(truncate_bytes=0),
        Fault(content_range="bytes 0-49999/300000"),
        Fault(content_range="bytes 1000-51999/300000"),
        Fault(content_range="bytes 2000-1000/300000"),
        Fault(content_range="nonsense"),
        Fault(content_range=""),
    ],
    ids=lambda fault: str(
        {name: value for name, value in vars(fault).items() if value != getattr(Fault, name)}
    ),
)
def test_passing_faults_heal(folder, fault):
    policy = IMPATIENT if fault.is_silent else QUICK
    with http_server(folder, [fault, fault]) as server:
        assert Fetcher(policy).fetch(f"{server.url}/a.tar", 1000, 50_000) == CONTENT[1000:51_000]
        assert server.num_requests["a.tar"] == 3
    with http_server(folder, lambda path, wanted: fault) as server:
        fails(
            server,
            r"^http://127\.0\.0\.1:\d+/a\.tar\?\.\.\.: gave up after 4 attempts \(.+\); see to the network",
            policy,
        )


def test_refused_connection_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar?token=secret"
        with pytest.raises(DataError, match=r"gave up after 4 attempts \(no answer: .*refused") as caught:
            Fetcher(QUICK).fetch_whole(url)
    assert "secret" not in str(caught.value)


def test_broken_body_is_resumed_where_it_broke(folder):
    faults = [Fault(truncate_bytes=20_000), Fault(status=503), Fault(truncate_bytes=10_000)]
    with http_server(folder, faults) as server:
        assert Fetcher(QUICK).fetch(f"{server.url}/a.tar", 1000, 50_000) == CONTENT[1000:51_000]
        assert [wanted for _, wanted in server.ranges] == [
            "bytes=1000-50999",
            "bytes=21000-50999",
            "bytes=21000-50999",
            "bytes=31000-50999",
        ]
        assert server.num_bytes["a.tar"] == 50_000


def test_progress_renews_patience(folder):
    with http_server(folder, [Fault(truncate_bytes=5000)] * 9) as server:
        assert Fetcher(QUICK).fetch(f"{server.url}/a.tar", 0, 50_000) == CONTENT[:50_000]
        assert server.num_bytes["a.tar"] == 50_000


def test_dripping_connection_is_left_and_the_rest_asked_for(folder):
    with http_server(folder, [Fault(drip_bytes=30_000)]) as server:
        assert Fetcher(IMPATIENT).fetch(f"{server.url}/a.tar", 1000, 50_000) == CONTENT[1000:51_000]
        (_, first), (_, second) = server.ranges
        assert first == "bytes=1000-50999"
        resumed = int(second.removeprefix("bytes=").partition("-")[0])
        # A handful of bytes dripped: far fewer than the floor.
        assert 31_000 < resumed < 31_000 + IMPATIENT.window_bytes


def test_server_that_only_drips_is_given_up(folder):
    with http_server(folder, lambda path, wanted: Fault(drip_bytes=0)) as server:
        fails(server, r"gave up after 4 attempts \(only \d+ bytes in 0 seconds\)", IMPATIENT)


def test_server_without_ranges(folder):
    with http_server(folder, lambda path, wanted: Fault(has_ranges=False)) as server:
        fails(server, r"does not do ranges \(it sent all 300000 bytes\)")
        assert Fetcher(QUICK).fetch(f"{server.url}/a.tar", 0, len(CONTENT)) == CONTENT
        assert Fetcher(QUICK).fetch_whole(f"{server.url}/a.tar") == CONTENT
        with pytest.raises(DataError, match="does not do ranges"):
            Fetcher(QUICK).fetch(f"{server.url}/a.tar", 0, 1000)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "correct the location or the settings and give the same command again"),
        (401, "renew the credentials or the signed URL and give the same command again"),
        (403, "renew the credentials or the signed URL and give the same command again"),
        (404, "put it back or correct the location, and give the same command again"),
        (416, "index again"),
    ],
)
def test_refusals_are_final(folder, status, remedy):
    with http_server(folder, lambda path, wanted: Fault(status=status)) as server:
        fails(server, rf"^http://127\.0\.0\.1:\d+/a\.tar\?\.\.\.: the server answered {status} .*; {remedy}$")
        assert server.num_requests["a.tar"] == 1


def test_reason_of_an_expired_signature_is_told(folder):
    body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    with http_server(folder, lambda path, wanted: Fault(status=403, body=body)) as server:
        fails(server, r"the server answered 403 AccessDenied Request has expired; renew the credentials")


def test_replaced_object_is_noticed(folder):
    with http_server(folder) as server:
        with Fetcher(QUICK).open_stream(f"{server.url}/a.tar") as stream:
            version = {"expected_bytes": stream.num_bytes, "etag": stream.etag}
        assert Fetcher(QUICK).fetch(f"{server.url}/a.tar", 7, 9, **version) == CONTENT[7:16]
        fails(
            server,
            "has 300000 bytes instead of 300001: it was replaced since it was indexed; index again",
            expected_bytes=300_001,
        )
        fails(
            server,
            "has the ETag .* instead of older: it was replaced since it was indexed; index again",
            etag="older",
        )
        assert server.num_requests["a.tar"] == 4  # never asked twice
    with http_server(folder, [Fault(truncate_bytes=20_000, etag="1"), Fault(etag="2")]) as server:
        fails(server, "has the ETag 2 instead of 1: it was replaced while it was read")
    with (
        http_server(folder) as server,
        pytest.raises(DataError, match="asked for is byte 300000; index again"),
    ):
        Fetcher(QUICK).fetch(f"{server.url}/a.tar", 299_999, 2)


def test_redirects_are_followed_and_bodies_not_decoded(folder):
    packed = gzip.compress(b"as stored")
    with http_server(folder) as other:
        (folder / "b.gz").write_bytes(packed)
        there = Fault(status=302, headers=(("Location", f"{other.url}/b.gz?token=secret"),))
        with http_server(folder, [there]) as server:
            assert Fetcher(QUICK).fetch_whole(f"{server.url}/a.tar") == packed


def test_connections_are_kept(folder):
    with http_server(folder) as server:
        fetcher = Fetcher(QUICK)
        for start in range(5):
            fetcher.fetch(f"{server.url}/a.tar", start, 1000)
        assert server.num_connections == 1


def test_user_and_password_of_a_url_are_sent_and_not_told(folder):
    with http_server(folder, [Fault(), Fault(status=401)]) as server:
        url = server.url.replace("http://", "http://me:se%40cret@") + "/a.tar"
        assert Fetcher(QUICK).fetch(url, 0, 10) == CONTENT[:10]
        assert server.authorizations == ["Basic " + base64.b64encode(b"me:se@cret").decode()]
        with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:\d+/a\.tar: the server answered 401"):
            Fetcher(QUICK).fetch(url, 0, 10)


def test_threads_share_a_fetcher(folder):
    with http_server(folder, lambda path, wanted: Fault(status=503) if "9-" in wanted else None) as server:
        fetcher, found = Fetcher(QUICK), {}

        def work(start):
            found[start] = fetcher.fetch(f"{server.url}/a.tar", start, 5000)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(1000, 1008)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {start: CONTENT[start : start + 5000] for start in range(1000, 1008)}


def _fetch(fetcher, url, results):
    results.put(fetcher.fetch(url, 10, 5))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_have_their_own_connections(folder, method):
    with http_server(folder) as server:
        fetcher = Fetcher(QUICK)
        fetcher.fetch(f"{server.url}/a.tar", 0, 5)  # a kept connection when it forks
        with fetcher._lock:  # and a lock that a thread of the parent holds
            context = multiprocessing.get_context(method)
            results = context.Queue()
            child = context.Process(target=_fetch, args=(fetcher, f"{server.url}/a.tar", results))
            child.start()
            assert results.get(timeout=60) == CONTENT[10:15]
            child.join()
        assert fetcher.fetch(f"{server.url}/a.tar", 0, 5) == CONTENT[:5]
        assert pickle.loads(pickle.dumps(fetcher)).policy == QUICK


def test_web_folders_cannot_be_listed():
    with pytest.raises(DataError, match="cannot be listed; name the tars"):
        Fetcher(QUICK).list_tars("https://example.invalid/corpus")


def test_slow_line_still_delivers(folder):
    with http_server(folder) as server, delayed(server.port, 0.01) as port:
        assert Fetcher(QUICK).fetch(f"http://127.0.0.1:{port}/a.tar", 3, 5) == CONTENT[3:8]


# S3


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        import boto3

        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="corpus")
        for name in ("train/b.tar", "train/a.tar", "train/a.tar.idx", "train/deep/c.tar", "train2/d.tar"):
            client.put_object(Bucket="corpus", Key=name, Body=CONTENT)
        yield client


def test_s3_ranges_and_whole_objects(s3):
    fetcher = Fetcher(QUICK)
    url = "s3://corpus/train/a.tar"
    assert fetcher.fetch(url, 1000, 100_000, expected_bytes=len(CONTENT)) == CONTENT[1000:101_000]
    stream = fetcher.open_stream(url)
    assert stream.num_bytes == len(CONTENT)
    assert stream.read(10) + stream.read() == CONTENT
    assert fetcher.fetch(url, 0, 10, etag=stream.etag) == CONTENT[:10]
    with pytest.raises(DataError, match="was replaced since it was indexed"):
        fetcher.fetch(url, 0, 10, etag="older")


def test_s3_lists_a_folder_in_pages(s3):
    for number in range(12):
        s3.put_object(Bucket="corpus", Key=f"many/{number:04d}.tar", Body=b"")
    fetcher = Fetcher(QUICK)
    expected = ["s3://corpus/train/a.tar", "s3://corpus/train/b.tar"]
    assert fetcher.list_tars("s3://corpus/train") == fetcher.list_tars("s3://corpus/train/") == expected
    expected = [f"s3://corpus/many/{number:04d}.tar" for number in range(12)]
    assert fetcher.list_tars("s3://corpus/many", page_size=5) == expected
    assert fetcher.list_tars("s3://corpus") == []
    with pytest.raises(DataError, match=r"^s3://nowhere: the server answered 404 NoSuchBucket"):
        fetcher.list_tars("s3://nowhere")


def test_s3_missing_key_and_bucket_are_named(s3):
    for location, code in (("s3://corpus/none.tar", "NoSuchKey"), ("s3://nowhere/a.tar", "NoSuchBucket")):
        with pytest.raises(DataError, match=rf"^{location}: the server answered 404 {code} .*; put it back"):
            Fetcher(QUICK).fetch(location, 0, 10)


def _s3_error(status, code):
    body = f"<Error><Code>{code}</Code><Message>The words of the server.</Message></Error>".encode()
    return Fault(status=status, body=body, headers=(("Content-Type", "application/xml"),))


@pytest.mark.parametrize(
    ("fault", "num_requests"),
    [
        (_s3_error(400, "ExpiredToken"), 2),  # once more with credentials read anew
        (_s3_error(403, "AccessDenied"), 1),
        (_s3_error(403, "InvalidAccessKeyId"), 1),
    ],
)
def test_s3_credentials_that_do_not_serve(folder, fault, num_requests):
    with http_server(folder, lambda path, wanted: fault) as server, aws_environment(server.url):
        with pytest.raises(
            DataError,
            match=r"^s3://corpus/a\.tar: the server answered 40[03] \w+ The words of the server\.; "
            "renew the credentials or the signed URL and give the same command again$",
        ):
            Fetcher(QUICK).fetch("s3://corpus/a.tar", 0, 10)
        assert server.num_requests.total() == num_requests


def test_s3_faults_heal(folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.tar").write_bytes(CONTENT)
    faults = [
        _s3_error(503, "SlowDown"),
        _s3_error(400, "RequestTimeout"),
        Fault(truncate_bytes=20_000),
        Fault(drip_bytes=10_000),
        Fault(is_silent=True),
    ]
    with http_server(folder, faults) as server, aws_environment(server.url):
        assert Fetcher(IMPATIENT).fetch("s3://corpus/a.tar", 1000, 50_000) == CONTENT[1000:51_000]
        assert server.num_requests.total() == 6
        # What was on its way when the drip was left is all that came twice.
        assert 50_000 <= server.num_bytes.total() < 50_000 + 100


def test_s3_refused_connection_is_tried_again_and_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with (
            aws_environment(f"http://127.0.0.1:{unused.getsockname()[1]}"),
            pytest.raises(DataError, match=r"gave up after 4 attempts \(no answer: Could not connect"),
        ):
            Fetcher(QUICK).fetch("s3://corpus/a.tar", 0, 10)


def test_s3_connections_are_kept_and_retries_are_ours(folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.tar").write_bytes(CONTENT)
    with http_server(folder) as server, aws_environment(server.url):
        fetcher = Fetcher(QUICK)
        for start in range(5):
            fetcher.fetch("s3://corpus/a.tar", start, 1000)
        assert server.num_connections == 1
    with (
        http_server(folder, lambda path, wanted: _s3_error(500, "InternalError")) as server,
        aws_environment(server.url),
        pytest.raises(DataError, match=r"gave up after 4 attempts \(the server answered 500 InternalError"),
    ):
        Fetcher(QUICK).fetch("s3://corpus/a.tar", 0, 1000)
    assert server.num_requests.total() == 4


def test_s3_expired_credentials_are_renewed(folder, tmp_path, monkeypatch):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.tar").write_bytes(CONTENT)
    credentials = folder / "credentials"

    def write(key):
        credentials.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    def expired(path, wanted):
        if "NEW" in credentials.read_text():
            return None
        write("NEW")
        return _s3_error(400, "ExpiredToken")

    write("OLD")
    with http_server(folder, expired) as server, aws_environment(server.url):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        assert Fetcher(QUICK).fetch("s3://corpus/a.tar", 5, 10) == CONTENT[5:15]
        assert [re.search("Credential=(OLD|NEW)/", text)[1] for text in server.authorizations] == [
            "OLD",
            "NEW",
        ]


def test_s3_without_credentials_or_bucket(folder, monkeypatch):
    with http_server(folder) as server, aws_environment(server.url):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match=r"^s3://corpus/a\.tar: Unable to locate credentials; set up"):
            Fetcher(QUICK).fetch("s3://corpus/a.tar", 0, 10)
        with pytest.raises(DataError, match="names no bucket"):
            Fetcher(QUICK).fetch("s3:///a.tar", 0, 10)


def test_s3_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"an s3:// location needs the package boto3.*kandinsky-dist\[s3\]"):
        Fetcher(QUICK).fetch("s3://corpus/a.tar", 0, 10)
