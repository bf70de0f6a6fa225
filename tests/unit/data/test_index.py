import io
import logging
import os
import shutil
from pathlib import Path

import pytest
from data_tars import picture, sample, write_tar
from helpers.servers import Fault, http_server, s3_server
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing import index_shard
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.manifest import MANIFEST_NAME
from kandinsky_dist.data.shard_index import read_shard_index
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import DataError


def index(shards, **options):
    return index_shards(str(shards), progress=False, **options)


def sidecar(manifest, number):
    return read_shard_index(manifest.sidecar(number), "")


@pytest.fixture
def walks(monkeypatch) -> list[str]:
    """Locations of the tars that are read; those whose sidecar still holds are not."""
    found: list[str] = []
    walk_tar = index_shard.walk_tar

    def counted(reader, **options):
        found.append(os.path.basename(reader.location))
        return walk_tar(reader, **options)

    monkeypatch.setattr(index_shard, "walk_tar", counted)
    return found


# What a sample is


def test_keys_and_extensions_as_webdataset_sees_them(tmp_path):
    members = []
    for key in ("a", "folder.v2/b", "folder.v2/c c", "ünïcode"):
        members += [(f"{key}.JPG", picture(1)), (f"{key}.txt", b"words"), (f"{key}.seg.png", b"mask")]
    members += [(".hidden.txt", b""), ("__note__/x.txt", b""), ("no_extension", b"")]
    path = write_tar(tmp_path / "a.tar", members)
    found = sidecar(index(tmp_path), 0)
    data = path.read_bytes()
    ours = [
        (key, {name: data[start : start + size] for name, (start, size) in found.members(n).items()})
        for n, key in enumerate(found.keys_N)
    ]
    theirs = [
        (item.pop("__key__"), {name: value for name, value in item.items() if not name.startswith("__")})
        for item in group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(data)))
    ]
    assert ours == theirs
    assert found.extensions == ("jpg", "seg.png", "txt")


def test_img2datasets_layout(tmp_path):
    """Folders of 00000.tar ... with KEY.jpg, .txt and .json, beside files of its own; read as it is."""
    for shard in range(2):
        members = []
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            image = picture(number, (40 + number, 30), "WEBP" if number == 1 else "JPEG")
            members += [
                (f"{key}.{'webp' if number == 1 else 'jpg'}", image),
                (f"{key}.json", b'{"caption": "words"}'),
                (f"{key}.txt", b"words"),
            ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / f"{shard:05d}.parquet").touch()
    manifest = index(tmp_path)
    assert manifest.num_samples == 6
    assert sidecar(manifest, 1).widths_N.tolist() == [40, 41, 42]
    found = LocalStorage(manifest).read(Place(1, 1))
    assert (found.key, sorted(found.members)) == ("000010001", ["json", "txt", "webp"])


def test_image_sizes_and_aspects(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (320, 180)).save(turned, "JPEG", exif=exif)
    members = [
        *sample(0, png=picture(0, (64, 64))),
        ("1.jpg", turned.getvalue()), ("1.txt", b"x"),
        *sample(2, png=b"broken"),
        # Its image is the one that decoding takes: the first of the known extensions.
        ("3.png", picture(0, (9, 9))), ("3.jpg", picture(0, (40, 30), "JPEG")), ("3.txt", b"x"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    for checksums in (False, True):
        manifest = index(tmp_path, checksums=checksums)
        found = sidecar(manifest, 0)
        assert list(zip(found.widths_N.tolist(), found.heights_N.tolist(), strict=True)) == [
            (64, 64), (180, 320), (0, 0), (40, 30),
        ]  # fmt: skip
        assert manifest.shard(0).aspect_counts == tuple(found.aspect_counts().tolist())
        assert manifest.shard(0).aspect_counts == (0, 1, 0, 0, 2, 1, 0, 0, 0)


def test_unusable_samples_are_left_out_and_counted(tmp_path, caplog):
    members = [*sample(0), ("1.png", picture(1)), ("2.txt", b"x"), ("3.json", b"{}"), *sample(4)]
    write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # the second time from the sidecar
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert index(tmp_path).num_samples == 2
        assert "3 samples left out (2 with no image, 1 with no caption), first a.tar:1" in caplog.text


def test_captions_of_other_extensions(tmp_path, walks):
    members = [("0.png", picture(0)), ("0.json", b"{}"), *sample(1), ("2.png", picture(2))]
    write_tar(tmp_path / "a.tar", members)
    assert index(tmp_path).num_samples == 1
    assert index(tmp_path, captions=("json", "txt")).num_samples == 2
    assert index(tmp_path, captions=("json.caption=2",)).num_samples == 1  # as data.captions has it
    assert len(walks) == 3  # a sidecar made for other captions does not hold
    with pytest.raises(DataError, match=r"no sample with an image and a \.cap or \.alt in 1 shards"):
        index(tmp_path, captions=("cap", "alt"))


def test_encoder_outputs_need_no_image(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.cached", b"\0" * 9000), ("1.txt", b"x"), *sample(2)])
    manifest = index(tmp_path)
    assert list(sidecar(manifest, 0).keys_N) == ["0", "00002"]
    assert sidecar(manifest, 0).widths_N.tolist() == [0, 24]


def test_empty_tar_warns_unless_nothing_remains(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="1 shards; they are empty"):
        index(tmp_path)
    write_tar(tmp_path / "b.tar", sample(0))
    with caplog.at_level(logging.WARNING):
        assert index(tmp_path).num_samples_S.tolist() == [0, 1]
    assert "1 shards have no usable sample, first a.tar" in caplog.text


# Damage


@pytest.mark.parametrize(
    "members", [sample(0) + sample(1) + sample(0), [("a.png", b""), ("a.PNG", b""), ("a.txt", b"")]]
)
def test_a_key_twice_is_refused(tmp_path, members):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"1 of 1 shards are damaged: .*a\.tar has the key .* twice"):
        index(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, 700)


def flip_a_header_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)


def compress(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + bytes(2000))


def key_twice(path: Path) -> None:
    write_tar(path, sample(1) + sample(2) + sample(1))


DAMAGE = [
    (cut, "is cut short: 700 bytes"),
    (flip_a_header_bit, "is not a tar"),
    (compress, r"is not a tar \(it is compressed: gunzip it\)"),
    (key_twice, "has the key '00001' twice"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_shard_does_not_stop_the_others(make_corpus, walks, caplog, damage, words):
    manifest = make_corpus([1] * 4)
    root = Path(manifest.root)
    shutil.copytree(root, root.parent / "whole")
    for path in root.glob("*.idx"):
        path.unlink()
    (root / MANIFEST_NAME).unlink()
    for number in (1, 2):
        damage(root / f"train-00{number}.tar")
    with pytest.raises(
        DataError, match=rf"^2 of 4 shards are damaged: .*train-001\.tar {words}.*--skip-damaged"
    ) as caught:
        index(root)
    assert "\n" not in str(caught.value)
    assert not (root / MANIFEST_NAME).exists()
    assert sorted(path.name for path in root.glob("*.idx")) == ["train-000.tar.idx", "train-003.tar.idx"]
    walks.clear()
    with caplog.at_level(logging.WARNING):
        part = index(root, skip_damaged=True)
    assert list(part.tars) == ["train-000.tar", "train-003.tar"]
    assert "2 of 4 shards are damaged and left out: train-001.tar, train-002.tar (" in caplog.text
    assert sorted(walks) == ["train-001.tar", "train-002.tar"][: len(walks)]
    for path in (root.parent / "whole").glob("*.tar"):
        shutil.copy2(path, root)
    walks.clear()
    assert index(root).fingerprint == manifest.fingerprint
    assert sorted(walks) == ["train-001.tar", "train-002.tar"]


def test_skipping_all_of_them_is_refused(make_corpus):
    manifest = make_corpus([1])
    cut(Path(manifest.tar(0)))
    with pytest.raises(DataError, match="1 of 1 shards are damaged"):
        index(manifest.root, skip_damaged=True)


# Going on


def test_only_changed_shards_are_read_again(make_corpus, walks):
    manifest = make_corpus([2, 2])
    assert len(walks) == 2
    walks.clear()
    assert index(manifest.root).fingerprint == manifest.fingerprint
    assert walks == []
    write_tar(Path(manifest.tar(1)), sample(7) + sample(8) + sample(9))
    again = index(manifest.root)
    assert again.num_samples_S.tolist() == [2, 3]
    assert walks == ["train-001.tar"]
    assert again.fingerprint != manifest.fingerprint


def test_an_interrupted_run_continues(make_corpus, walks, monkeypatch):
    manifest = make_corpus([1] * 5)
    root = Path(manifest.root)
    for path in (*root.glob("*.idx"), root / MANIFEST_NAME):
        path.unlink()
    walks.clear()
    walk = index_shard.walk_tar

    def interrupted(reader, **options):
        if reader.location.endswith("train-003.tar"):
            raise KeyboardInterrupt
        return walk(reader, **options)

    with monkeypatch.context() as patched:
        patched.setattr(index_shard, "walk_tar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index(root)
    assert not (root / MANIFEST_NAME).exists()
    assert len(walks) == 3
    assert index(root).fingerprint == manifest.fingerprint
    assert walks == [f"train-00{number}.tar" for number in range(5)]  # none of them twice


def test_a_replaced_shard_of_equal_names_and_sizes_is_told_apart(make_corpus):
    """Equal lengths, names and times, another picture: only content tells them apart."""
    noise = [os.urandom(30_000) for _ in range(2)]
    manifests = []
    for folder, payload in (("a", noise[0]), ("b", noise[1]), ("c", noise[0])):
        manifests.append(make_corpus([2], folder, png=payload))
    assert len({manifest.shard(0).num_bytes for manifest in manifests}) == 1
    assert manifests[0].fingerprint != manifests[1].fingerprint
    assert manifests[0].fingerprint == manifests[2].fingerprint


def test_checksums_are_asked_for_once(make_corpus, walks):
    manifest = make_corpus([2, 1])
    assert sidecar(manifest, 0).checksums(0) == {}
    walks.clear()
    again = index(manifest.root, checksums=True)
    assert len(walks) == 2
    assert again.fingerprint == manifest.fingerprint  # runs go on
    assert index(manifest.root).fingerprint == manifest.fingerprint
    assert index(manifest.root, checksums=True).fingerprint == manifest.fingerprint
    assert len(walks) == 2
    assert sorted(sidecar(again, 0).checksums(1)) == ["png", "txt"]


def test_parallel_equals_serial(make_corpus):  # two seconds: processes start
    manifest = make_corpus([1] * 9)
    for number in range(9):
        os.unlink(manifest.sidecar(number))
    parallel = index(manifest.root, num_processes=2)
    assert [parallel.shard(number) for number in range(9)] == [manifest.shard(number) for number in range(9)]
    cut(Path(manifest.tar(5)))
    os.unlink(manifest.sidecar(8))
    with pytest.raises(DataError, match=r"1 of 9 shards are damaged: .*train-005\.tar"):
        index(manifest.root, num_processes=2)
    assert os.path.exists(manifest.sidecar(8))


# Where things lie


def test_nested_folders(tmp_path):
    for name in ("b/x.tar", "a/deep/x.tar", "x.tar", ".partial/x.tar"):
        write_tar(tmp_path / "c" / name, sample(len(name)))
    manifest = index(tmp_path / "c")
    assert list(manifest.tars) == ["a/deep/x.tar", "b/x.tar", "x.tar"]
    assert list(manifest.sidecars) == ["a/deep/x.tar.idx", "b/x.tar.idx", "x.tar.idx"]
    shutil.move(tmp_path / "c", tmp_path / "moved")
    moved = read_manifest(str(tmp_path / "moved"))
    assert LocalStorage(moved).read(Place(0, 0)).members["txt"] == b"caption 12"
    assert moved.fingerprint == manifest.fingerprint


def test_an_index_apart_from_read_only_shards(make_corpus, tmp_path, walks):
    manifest = make_corpus([1, 2])
    root = Path(manifest.root)
    for path in (*root.glob("*.idx"), root / MANIFEST_NAME):
        path.unlink()
    write_tar(root / "more" / "train-000.tar", sample(9))
    before = sorted(path.name for path in root.rglob("*"))
    for path in (root / "more", root):
        path.chmod(0o500)
    try:
        if os.geteuid() != 0:
            with pytest.raises(DataError, match=r"train-000\.tar\.idx cannot be written: .*--out FOLDER"):
                index(root)
        walks.clear()
        for shards in (root, f"{root}/**/*.tar"):
            found = index(shards, out=tmp_path / "out")
            assert found.num_samples == 4
            assert LocalStorage(read_manifest(str(tmp_path / "out"))).read(Place(0, 0)).members
        assert len(walks) == 3  # the second call found the first one's sidecars
    finally:
        for path in (root, root / "more"):
            path.chmod(0o700)
    assert sorted(path.name for path in root.rglob("*")) == before
    assert sorted(found.tars) == [
        "../corpus/more/train-000.tar", "../corpus/train-000.tar", "../corpus/train-001.tar",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.idx")) == [
        "train-000.tar.idx", "train-000.tar.idx", "train-001.tar.idx",
    ]  # fmt: skip
    shutil.move(root, tmp_path / "elsewhere")
    with pytest.raises(DataError, match="put the shard back"):
        LocalStorage(read_manifest(str(tmp_path / "out"))).read(Place(0, 0))


def test_a_glob_gets_sidecars_only(make_corpus, tmp_path):
    manifest = make_corpus([1, 1])
    root = Path(manifest.root)
    before = (root / MANIFEST_NAME).read_bytes()
    write_tar(root / "train-002.tar", sample(5))
    part = index(root / "train-002.tar")
    assert (part.num_samples, part.root) == (1, "")
    assert (root / MANIFEST_NAME).read_bytes() == before
    assert read_manifest(f"{root}/train-00[12].tar").num_samples == 2
    assert index(root).num_samples == 3


def test_damaged_sidecars_are_made_anew(make_corpus):
    manifest = make_corpus([1])
    path = Path(manifest.sidecar(0))
    whole = path.read_bytes()
    for data in (b"", b"\xff" * 8, b"nonsense" * 10, whole[:-9]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train-000\.tar\.idx cannot be read .*; run: again"):
            read_shard_index(str(path), "again")
        assert index(manifest.root).fingerprint == manifest.fingerprint
        assert len(path.read_bytes()) == len(whole)


# Remote shards


def test_remote_shards_are_streamed_once(make_corpus, tmp_path, walks):
    manifest = make_corpus([2, 1])
    with http_server(Path(manifest.root)) as server:
        pattern = f"{server.url}/train-{{000..001}}.tar?signature=secret"
        with pytest.raises(DataError, match="--out FOLDER") as caught:
            index(pattern)
        assert "secret" not in str(caught.value)
        walks.clear()
        found = index(pattern, out=tmp_path / "out", num_processes=1)
        assert sorted(server.num_requests.items()) == [("train-000.tar", 1), ("train-001.tar", 1)]
        again = index(pattern, out=tmp_path / "out", num_processes=1)
        assert again.fingerprint == found.fingerprint
        assert len(walks) == 2  # length and ETag agree
        Path(manifest.tar(1)).touch()
        index(pattern, out=tmp_path / "out", num_processes=1)
        assert len(walks) == 3
    assert list(found.tars) == [f"{server.url}/train-00{number}.tar?signature=secret" for number in range(2)]
    assert list(found.sidecars) == ["train-000.tar.idx", "train-001.tar.idx"]
    for number in range(2):
        ours, local = sidecar(found, number), sidecar(manifest, number)
        assert ours.metadata["fingerprint"] == local.metadata["fingerprint"]
        assert (ours.offsets_NE == local.offsets_NE).all()
        assert (ours.widths_N == local.widths_N).all()
        assert (ours.checksums_NE >= 0).all()


def test_a_connection_that_breaks_does_not_show(make_corpus, tmp_path):
    manifest = make_corpus([3])
    with http_server(Path(manifest.root), [Fault(truncate_bytes=5000)]) as server:
        found = index(f"{server.url}/train-000.tar", out=tmp_path / "out")
    assert found.shard(0).fingerprint == manifest.shard(0).fingerprint


def test_damaged_and_absent_remote_shards(make_corpus, tmp_path, caplog):
    manifest = make_corpus([1] * 4)
    os.unlink(manifest.tar(1))
    with http_server(Path(manifest.root)) as server:
        pattern = f"{server.url}/train-{{000..004}}.tar"
        with caplog.at_level(logging.WARNING):
            assert index(pattern, out=tmp_path / "out", num_processes=1).num_samples == 3
        assert f"2 of 5 numbers have no shard, first {server.url}/train-001.tar" in caplog.text
        with pytest.raises(DataError, match="404"):
            index(f"{server.url}/train-001.tar", out=tmp_path / "one", num_processes=1)
        with pytest.raises(DataError, match="none of the 2 shards exists"):
            index(f"{server.url}/x-{{0..1}}.tar", out=tmp_path / "none", num_processes=1)
        cut(Path(manifest.tar(2)))
        with pytest.raises(DataError, match=r"1 of 3 shards are damaged: .*/train-002\.tar is cut short"):
            index(pattern, out=tmp_path / "out", num_processes=1)
        assert index(pattern, out=tmp_path / "out", num_processes=1, skip_damaged=True).num_samples == 2


def test_no_name_leads_out_of_the_folder(make_corpus, tmp_path):
    manifest = make_corpus([1])
    (tmp_path / "list.txt").write_text("http://h/a/../../x.tar\nhttp://h/b//x.tar\n")
    from kandinsky_dist.data.indexing.index import names_below

    names = names_below(
        "x", ["http://h/a/../../x.tar", "http://h/b//x.tar", "s3://h/./../x.tar", manifest.tar(0)]
    )
    assert all(".." not in Path(name).parts and not Path(name).is_absolute() for name in names)
    assert len(set(names)) == 4


def test_a_bucket(make_corpus, tmp_path):  # two seconds: a server starts
    manifest = make_corpus([2, 1])
    with s3_server():
        import boto3

        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="indexed")
        for number in range(2):
            client.upload_file(manifest.tar(number), "indexed", f"corpus/train-00{number}.tar")
        for shards, num_samples in (
            ("s3://indexed/corpus/", 3),
            ("s3://indexed/corpus", 3),
            ("s3://indexed/corpus/*-00[12].tar", 1),
            ("s3://indexed/corpus/train-{000..009}.tar", 3),
        ):
            found = index(shards, out=tmp_path / "out", num_processes=1)
            assert found.num_samples == num_samples, shards
        assert found.fingerprint == manifest.fingerprint
        assert list(found.tars) == [f"s3://indexed/corpus/train-00{number}.tar" for number in range(2)]
        with pytest.raises(DataError, match=r"names no \.tar shards"):
            index("s3://indexed/nothing/", out=tmp_path / "out")
