import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky_dist.data.packing import corpus
from kandinsky_dist.data.packing.corpus import build_demo, match_names, split_held_out
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import ConfigError, DataError

TONES = ("1f3fb", "1f3fc")


def names(count):
    rows = [
        {
            "hexcode": f"{0x1F600 + number:X}",
            "label": f"face {number}",
            "tags": ["face"],
            "group": 0,
            "skins": [
                {"hexcode": f"{0x1F600 + number:X}-{tone.upper()}", "label": f"face {number}: {tone}"}
                for tone in TONES
            ],
        }
        for number in range(count)
    ]
    rows.append({"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "group": 9})
    rows.append({"hexcode": "2764", "label": "red heart", "group": 0})
    return rows


GROUPS = {"groups": {"0": "smileys", "9": "flags"}}


def grouped(rows):
    return [{**row, "group": GROUPS["groups"][str(row["group"])]} for row in rows]


def stems(count):
    tones = [f"{0x1F600 + number:x}-{tone}" for number in range(count) for tone in TONES]
    return [
        *(f"{0x1F600 + number:x}" for number in range(count)),
        *tones,
        "1f1e9-1f1ea",
        "2764",
        "2764-fe0f",
        "ffff",
    ]


def test_matching_drops_flags_duplicates_and_strangers():
    emojis = match_names(stems(3), grouped(names(3)))
    assert sorted(emoji.key for emoji in emojis) == sorted(
        ["2764", *(f"1f60{n}{tone}" for n in range(3) for tone in ("", "-1f3fb", "-1f3fc"))]
    )
    heart = next(emoji for emoji in emojis if emoji.key == "2764")
    assert (heart.label, heart.base, heart.group) == ("red heart", "2764", "smileys")
    toned = next(emoji for emoji in emojis if emoji.key == "1f601-1f3fb")
    assert (toned.label, toned.base, toned.tags) == ("face 1: 1f3fb", "1f601", ("face",))


def test_skin_tones_stay_together_and_subsets_are_subsets():
    emojis = match_names(stems(200), grouped(names(200)))
    splits = split_held_out(emojis, None)
    bases = {split: {emoji.base for emoji in part} for split, part in splits.items()}
    assert not bases["train"] & bases["validation"]
    assert sum(map(len, splits.values())) == len(emojis)
    assert 0.02 < len(splits["validation"]) / len(emojis) < 0.12
    for max_samples in (2, 50, 300):
        part = split_held_out(emojis, max_samples)
        assert sum(map(len, part.values())) == max_samples
        assert all(part[split] for split in part)
        assert all(set(part[split]) <= set(splits[split]) for split in part)


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder that already holds small stand-ins of the two packages, in their layout."""
    folder = tmp_path / "cache" / "kandinsky-dist"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    with tarfile.open(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as archive:
        for number, stem in enumerate(stems(40)):
            pixels = np.zeros((40, 36, 4), np.uint8)
            pixels[10:30, 8:28] = (number, 100, 200, 255)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
            add(archive, f"package/assets/{stem}.webp", buffer.getvalue())
        add(archive, "package/../../evil.webp", b"never read")
    with tarfile.open(folder / "emojibase-data-17.0.0.tgz", "w:gz") as archive:
        add(archive, "package/en/data.json", json.dumps(names(40)).encode())
        add(archive, "package/meta/groups.json", json.dumps(GROUPS).encode())
    return folder


def test_corpus_from_packages(cache, tmp_path):
    manifests = build_demo(tmp_path / "demo", image_size=32, samples_per_shard=50)
    assert {split: Path(manifest.root).name for split, manifest in manifests.items()} == {
        "train": "train",
        "validation": "validation",
    }
    assert sum(manifest.num_samples for manifest in manifests.values()) == 121
    assert manifests["train"].num_samples_S[0] == 50
    sample = LocalStorage(manifests["validation"]).read(Place(0, 0))
    about = json.loads(sample.members["json"])
    assert sample.members["txt"].decode() == f"a 3d emoji of {about['label']}"
    image = Image.open(io.BytesIO(sample.members["jpg"]))
    assert (image.size, image.format) == ((32, 32), "JPEG")
    assert min(image.getpixel((0, 0))) > 240, "transparency must become white"
    again = build_demo(tmp_path / "demo", image_size=32, samples_per_shard=50)
    for split, manifest in manifests.items():
        assert again[split].fingerprint == manifest.fingerprint
    with pytest.raises(ConfigError, match="not made by this very command"):
        build_demo(tmp_path / "demo", image_size=16, samples_per_shard=50)


def test_max_samples(cache, tmp_path):
    manifests = build_demo(tmp_path / "demo", image_size=8, max_samples=20)
    assert sum(manifest.num_samples for manifest in manifests.values()) == 20
    with pytest.raises(ConfigError, match="max_samples=1 at least 2"):
        build_demo(tmp_path / "demo", max_samples=1)


def test_without_npm_the_alternative_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"npm is not on PATH.*kandinsky-dist data pack") as caught:
        build_demo(tmp_path / "demo")
    assert "\n" not in str(caught.value)


def test_a_failing_npm_is_quoted_in_one_line(tmp_path, monkeypatch):
    """A real program called npm that fails as one without a network does."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho one >&2\necho 'npm error network down' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match=r"failed \(npm error network down\); check the network"):
        build_demo(tmp_path / "demo")
    assert not list((tmp_path / "kandinsky-dist").iterdir())
    assert corpus.IMAGES_PACKAGE.count("@") == 2


@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
def test_a_damaged_archive_is_named(cache, tmp_path, keep):
    archive = cache / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DataError, match=r"fluent-emoji-3d-1\.1\.0\.tgz cannot be read .*remove it and retry"):
        build_demo(tmp_path / "demo")
