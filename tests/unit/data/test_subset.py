import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_tars import picture, write_tar
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data.catalogue import check_presence, read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.indexing.subset import make_subset
from kandinsky_dist.data.manifest import MANIFEST_NAME, Manifest
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.data.tables import Place
from kandinsky_dist.errors import ConfigError, DataError

SIZES = [[(64, 64), (32, 64), (128, 64)], [(16, 16)], [(64, 48), (300, 100), (65, 64), None]]
"""Width and height of each sample of three shards; None: broken."""
CAPTIONS = ["a red cat", "a dog", "two cats", "x", "ein Kätzchen", "", "a blue cat", "a cat"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Read only."""
    root = tmp_path_factory.mktemp("subset") / "corpus"
    number = 0
    for shard, sizes in enumerate(SIZES):
        members = []
        for size in sizes:
            members += [
                (f"{number}.png", b"broken" if size is None else picture(number, size)),
                (f"{number}.txt", CAPTIONS[number].encode()),
            ]
            number += 1
        write_tar(root / f"deep-{shard % 2}" / f"{shard}.tar", members)
    index_shards(str(root), progress=False)
    return root


def keys(manifest: Manifest) -> list[int]:
    storage = LocalStorage(manifest)
    found = []
    for shard in range(len(manifest)):
        found += [int(storage.read(Place(shard, n)).key) for n in range(int(manifest.num_samples_S[shard]))]
    return sorted(found)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"min_side": 64}, [0, 2, 5, 6]),
        ({"min_pixels": 64 * 64}, [0, 2, 5, 6]),
        ({"min_pixels": 64 * 65 + 1}, [2, 5]),
        ({"min_aspect": 1.0}, [0, 2, 3, 4, 5, 6]),
        ({"min_aspect": 0.9, "max_aspect": 1.1}, [0, 3, 6]),
        ({"max_aspect": 0.5}, [1]),
        ({"min_caption_length": 9}, [0, 4, 6]),
        ({"max_caption_length": 5}, [1, 3, 5, 7]),
        ({"caption_matches": r"\bcats?\b"}, [0, 2, 6, 7]),
        ({"caption_matches": "ätz"}, [4]),
        ({"caption_matches": "cat", "min_side": 65}, []),
        ({"caption_matches": "cat", "min_side": 64}, [0, 2, 6]),
    ],
)
def test_conditions(corpus, tmp_path, conditions, expected):
    if not expected:
        with pytest.raises(DataError, match="none of 8 samples fits"):
            make_subset(str(corpus), tmp_path / "out", progress=False, **conditions)
        assert list(tmp_path.iterdir()) == []
        return
    manifest = make_subset(str(corpus), tmp_path / "out", progress=False, **conditions)
    found = read_manifest(str(tmp_path / "out"))
    check_presence(found, str(tmp_path / "out"))
    assert found.fingerprint == manifest.fingerprint != read_manifest(str(corpus)).fingerprint
    assert keys(found) == expected
    assert len(found) == 3
    assert found.aspect_counts_SA.sum(1).tolist() == found.num_samples_S.tolist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST_NAME, "origin.json"]


def test_samples_are_found_by_their_shape(corpus, tmp_path):
    manifest = make_subset(str(corpus), tmp_path / "out", min_aspect=1.9, progress=False)
    (wide,) = set(np.flatnonzero(manifest.aspect_counts_SA.sum(0)).tolist())
    assert manifest.aspect_counts_SA[:, wide].tolist() == [1, 1, 0]  # deep-0/0, deep-0/2, deep-1/1
    assert LocalStorage(manifest).read(Place(1, 0, wide)).key == "5"


@pytest.mark.parametrize("limit", [1, 3, 4, 8, 9])
def test_the_first_that_fit(corpus, tmp_path, limit):
    manifest = make_subset(str(corpus), tmp_path / "out", limit=limit, progress=False)
    order = [0, 1, 2, 4, 5, 6, 7, 3]  # of the shards' paths
    assert keys(manifest) == sorted(order[:limit])


def test_a_subset_of_a_subset(corpus, tmp_path):
    make_subset(str(corpus), tmp_path / "one", caption_matches="cat", progress=False)
    two = make_subset(str(tmp_path / "one"), tmp_path / "deep" / "two", max_aspect=1.5, progress=False)
    assert keys(two) == [0, 6]
    assert keys(read_manifest(str(tmp_path / "deep" / "two"))) == [0, 6]


def test_images_of_unknown_size_are_counted(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_subset(str(corpus), tmp_path / "a", min_side=1, progress=False)
    assert "1 samples left out: the size of their image is not known" in caplog.text
    assert keys(make_subset(str(corpus), tmp_path / "b", min_caption_length=1, progress=False)) == [
        0,
        1,
        2,
        3,
        4,
        6,
        7,
    ]


def test_of_sidecars_alone(corpus, tmp_path):
    manifest = make_subset(f"{corpus}/deep-0/*.tar", tmp_path / "out", min_side=64, progress=False)
    assert keys(manifest) == [0, 2, 5, 6]


def test_the_same_call_is_kept_and_another_refused(corpus, tmp_path, caplog):
    first = make_subset(str(corpus), tmp_path / "out", min_side=64, progress=False)
    with caplog.at_level(logging.WARNING):
        assert (
            make_subset(str(corpus), tmp_path / "out", min_side=64, progress=False).fingerprint
            == first.fingerprint
        )
    assert "already complete (4 samples): kept" in caplog.text
    with pytest.raises(ConfigError, match="was not made by this very command"):
        make_subset(str(corpus), tmp_path / "out", min_side=65, progress=False)
    mine = Path(shutil.copytree(corpus, tmp_path / "mine"))
    before = (mine / MANIFEST_NAME).read_bytes()
    with pytest.raises(ConfigError, match="choose another folder"):
        make_subset(str(mine), mine, min_side=64, progress=False)
    assert (mine / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({}, "at least one condition"),
        ({"limit": 0}, "limit=0 must be above 0"),
        ({"min_aspect": float("nan")}, "min_aspect=nan must be above 0"),
        ({"min_aspect": 2.0, "max_aspect": 1.0}, r"min_aspect=2\.0 is above max_aspect=1\.0"),
        ({"caption_matches": "("}, "is no regular expression: missing"),
    ],
)
def test_what_cannot_be_meant(corpus, tmp_path, conditions, words):
    with pytest.raises(ConfigError, match=words):
        make_subset(str(corpus), tmp_path / "out", **conditions)


@given(
    min_side=st.none() | st.integers(1, 70),
    max_aspect=st.none() | st.floats(0.4, 4),
    min_caption_length=st.none() | st.integers(1, 12),
)
@examples(20)
def test_any_mixture_of_conditions(corpus, tmp_path_factory, min_side, max_aspect, min_caption_length):
    sizes = [size or (0, 0) for shard in SIZES for size in shard]
    expected = [
        number
        for number, ((width, height), caption) in enumerate(zip(sizes, CAPTIONS, strict=True))
        if (min_side is None or min(width, height) >= min_side)
        and (max_aspect is None or (height and width <= max_aspect * height))
        and (min_caption_length is None or len(caption.encode()) >= min_caption_length)
    ]
    conditions = {"min_side": min_side, "max_aspect": max_aspect, "min_caption_length": min_caption_length}
    if not expected:
        return
    out = tmp_path_factory.mktemp("subset") / "out"
    manifest = make_subset(str(corpus), out, limit=100, progress=False, **conditions)
    assert keys(manifest) == expected
