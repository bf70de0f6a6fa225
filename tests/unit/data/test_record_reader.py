"""Records arrive whole, in the order's order, and a damaged one is found and replaced by rule."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_tars import fail_reads
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.data import records
from kandinsky_dist.data.aspects import WHOLE
from kandinsky_dist.data.manifest import load_manifest
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.data.record_layout import RecordLayout, Sheet
from kandinsky_dist.data.records import RecordReader
from kandinsky_dist.errors import DataError, SampleError

NUM_SAMPLES = 40
FIXED = RecordLayout(torch.uint8, {"first": (2, 20), "second": (80,)})
ROWS = RecordLayout(torch.float16, {"first": (4,)}, rows=("states", 8), max_rows=7)


def payload(number: int) -> bytes:
    """A sealed record of 128 bytes that says whose it is."""
    tensors = {
        name: torch.full((1, *shape), number, dtype=torch.uint8) for name, shape in FIXED.shapes.items()
    }
    return FIXED.records(tensors)[0]


def payload_of_rows(number: int) -> bytes:
    """A sealed record of 1 to 7 rows that says whose it is."""
    first, states = (torch.full(shape, number, dtype=torch.float16) for shape in ((1, 4), (1, 7, 8)))
    return ROWS.records({"first": first, "states": states}, [number % 7 + 1])[0]


@pytest.fixture
def corpus(tmp_path):
    """5 shards of 8 records, their keys their numbers."""
    numbers = range(NUM_SAMPLES)
    samples = ({"__key__": f"{n:03d}", "cached": payload(n), "json": b"{}"} for n in numbers)
    write_shards(samples, tmp_path / "shards", samples_per_shard=8, origin={})
    return tmp_path / "shards"


def reader_of(corpus, *, check="seal", seed=0, selected=None, layout=FIXED) -> RecordReader:
    return RecordReader(order_of(corpus, seed, selected), {WHOLE: layout}, check=check)


def order_of(corpus, seed=0, selected=None) -> Order:
    manifest = load_manifest(str(corpus), "")
    if selected is not None:
        shards = np.array(selected) // 8
        manifest = dataclasses.replace(
            manifest,
            num_samples_S=np.bincount(shards, minlength=5),
            selected_N=(np.array(selected) % 8).astype(np.uint32),
        )
    return Order([manifest], seed=seed)


def expected(order: Order, positions) -> list[int]:
    places = order.locate(positions)
    rows = [
        index if order.manifest.selected(shard) is None else order.manifest.selected(shard)[index]
        for shard, index in zip(places.shards_B, places.indices_B, strict=True)
    ]
    return [int(shard * 8 + row) for shard, row in zip(places.shards_B, rows, strict=True)]


def numbers_in(batch) -> list[int]:
    values_BN = torch.cat([batch.tensors["first"].flatten(1), batch.tensors["second"]], 1)
    assert (values_BN == values_BN[:, :1]).all(), "a row holds bytes of several records"
    return values_BN[:, 0].tolist()


@pytest.mark.parametrize("check", ["seal", "crc32", "none"])
def test_a_batch_holds_the_records_at_its_positions(corpus, check):
    positions = [7, 3, 55, 0, 39, 120]
    reader = reader_of(corpus, check=check)
    batch = reader.read(positions)
    assert numbers_in(batch) == expected(order_of(corpus), positions)
    assert list(batch.keys()) == [f"{number:03d}" for number in numbers_in(batch)]
    assert (len(batch.keys()), batch.keys()[1]) == (6, list(batch.keys())[1])
    assert batch.bad_samples == ()


@pytest.fixture
def corpus_of_rows(tmp_path):
    """5 shards of 8 records of 1 to 7 rows."""
    samples = ({"__key__": f"{n:03d}", "cached": payload_of_rows(n)} for n in range(NUM_SAMPLES))
    write_shards(samples, tmp_path / "rows", samples_per_shard=8, origin={})
    return tmp_path / "rows"


def rows_in(batch) -> list[int]:
    """The numbers of records of rows, each of which must fill its own rows and leave zeros behind them."""
    first_BD, states_BLD = batch.tensors["first"], batch.tensors["states"]
    numbers = [int(row[0]) for row in first_BD]
    assert states_BLD.shape[1] == max(batch.num_rows_B) == max(number % 7 + 1 for number in numbers)
    for number, first_D, states_LD, num_rows in zip(
        numbers, first_BD, states_BLD, batch.num_rows_B.tolist(), strict=True
    ):
        assert num_rows == number % 7 + 1
        assert (first_D == number).all()
        assert (states_LD[:num_rows] == number).all()
        assert (states_LD[num_rows:] == 0).all()
    return numbers


@pytest.mark.parametrize("check", ["seal", "crc32", "none"])
def test_records_of_several_lengths_are_padded_to_the_longest_of_their_batch(corpus_of_rows, check):
    reader, lists = reader_of(corpus_of_rows, check=check, layout=ROWS), [[7, 3, 55, 0, 39], [2], [9, 120]]
    for batch, positions in zip(reader.batches(lists), lists, strict=True):
        assert rows_in(batch) == expected(order_of(corpus_of_rows), positions)
        assert batch.bad_samples == ()


@pytest.mark.parametrize("check", ["seal", "crc32"])
def test_a_replacement_may_be_longer_or_shorter_than_all_others(corpus_of_rows, check):
    order = order_of(corpus_of_rows)
    longer = [p for p in range(NUM_SAMPLES) if lengths(order, p, 1) > lengths(order, p, 0)]
    shorter = [p for p in range(NUM_SAMPLES) if lengths(order, p, 1) < lengths(order, p, 0)]
    for position in (longer[0], shorter[-1]):
        (place,) = order.locate([position]).each()
        flip(corpus_of_rows, order, place, bit=0x01)
        batch = reader_of(corpus_of_rows, check=check, layout=ROWS).read([position])
        assert [bad.position for bad in batch.bad_samples] == [position]
        replaced = order.locate([position], 1)
        number = int(replaced.shards_B[0] * 8 + replaced.indices_B[0])
        assert int(batch.tensors["first"][0, 0]) == number
        num_rows = number % 7 + 1
        assert batch.num_rows_B.tolist() == [num_rows]
        assert (batch.tensors["states"][0, :num_rows] == number).all()
        assert (batch.tensors["states"][0, num_rows:] == 0).all()
        flip(corpus_of_rows, order, place, bit=0x01)


def lengths(order, position, attempt) -> int:
    places = order.locate([position], attempt)
    return int(places.shards_B[0] * 8 + places.indices_B[0]) % 7 + 1


def test_every_single_bit_of_a_record_is_under_its_seal(tmp_path):
    """Each flipped on its own."""
    record = payload_of_rows(9)
    for bit in range(8 * len(record)):
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        assert not holds(bytes(changed)), bit
    assert holds(record)


def holds(record: bytes) -> bool:
    layout = ROWS
    sheet = Sheet(layout, layout.num_rows(np.array([len(record)])))
    sheet.fill([record])
    sheet.add_up(0, 1)
    return sheet.broken_seals() == []


@given(data=st.data(), num_threads=st.integers(0, 3), located_at_once=st.sampled_from([1, 5, 4096]))
@examples(40)
def test_threads_and_blocks_change_nothing(tmp_path_factory, data, num_threads, located_at_once):
    folder = tmp_path_factory.getbasetemp() / "records_property"
    if not folder.exists():
        samples = ({"__key__": f"{n:03d}", "cached": payload(n)} for n in range(NUM_SAMPLES))
        write_shards(samples, folder, samples_per_shard=8, origin={})
    lists = data.draw(st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=9), max_size=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LOCATED_AT_ONCE", located_at_once)
        batches = list(reader_of(folder).batches(lists, num_threads=num_threads))
    assert [batch.positions_B.tolist() for batch in batches] == lists
    assert [numbers_in(batch) for batch in batches] == [expected(order_of(folder), one) for one in lists]


def test_an_endless_order_is_read_only_as_far_as_it_is_used(corpus):
    asked = []

    def lists():
        for first in range(0, 10**9, 4):
            asked.append(first)
            yield range(first, first + 4)

    batches = reader_of(corpus).batches(lists(), num_threads=2)
    assert numbers_in(next(batches)) == expected(order_of(corpus), range(4))
    batches.close()
    assert len(asked) <= 2 * records.LOCATED_AT_ONCE // 4


def test_a_part_of_a_corpus(corpus):
    selected = [1, 5, 8, 9, 30, 39]
    batch = reader_of(corpus, selected=selected).read(range(6))
    assert sorted(numbers_in(batch)) == selected
    assert numbers_in(batch) == expected(order_of(corpus, selected=selected), range(6))


@pytest.mark.parametrize("check", ["seal", "crc32"])
def test_a_flipped_bit_is_found_and_replaced_by_the_orders_next_attempt(corpus, check):
    order = order_of(corpus)
    (victim,), (place,) = expected(order, [3]), order.locate([3]).each()
    flip(corpus, order, place, bit=0x10)
    batch = reader_of(corpus, check=check).read([2, 3, 4])
    (bad,) = batch.bad_samples
    replaced = order.locate([3], 1)
    new = int(replaced.shards_B[0] * 8 + replaced.indices_B[0])
    assert (bad.position, f"{victim:03d}: .cached is not what was written" in bad.reason) == (3, True)
    assert bad.replaced_by == f"train-0000{new // 8}.tar:{new:03d}"
    assert numbers_in(batch) == [*expected(order, [2]), new, *expected(order, [4])]
    assert batch.keys()[1] == f"{new:03d}"  # asked for after the replacement


def test_without_a_check_a_flipped_bit_is_not_found(corpus):
    order = order_of(corpus)
    (place,) = order.locate([3]).each()
    flip(corpus, order, place, bit=0x10)
    assert reader_of(corpus, check="none").read([3]).bad_samples == ()


def test_zeros_have_no_valid_seal():
    assert not holds(bytes(len(payload_of_rows(9))))


def test_a_record_of_another_size_or_none_is_a_damaged_sample(tmp_path):
    members = {
        2: {"cached": payload(2)[:-16]},
        3: {"cached": b""},
        5: {"jpg": b"x", "txt": b"y"},
        6: {"cached": payload(6) * 2},
    }
    samples = ({"__key__": f"{n:03d}", **members.get(n, {"cached": payload(n)})} for n in range(8))
    write_shards(samples, tmp_path / "shards", samples_per_shard=8, origin={})
    batch = reader_of(tmp_path / "shards").read(range(8))
    assert len(batch.bad_samples) >= 4
    said = " ".join(bad.reason for bad in batch.bad_samples)
    for words in (
        "002: .cached has 112 bytes, a record has 128",
        "003: .cached is empty: the sample was damaged when the shards were precomputed",
        "005: .cached is missing",
        "006: .cached has 256",
    ):
        assert words in said
    assert not {2, 3, 5, 6} & set(numbers_in(batch))


def test_a_size_between_two_numbers_of_rows_or_beyond_the_longest_is_no_records():
    sizes = [ROWS.record_bytes(n) for n in (0, 1, 7, 8)] + [ROWS.record_bytes(3) + 2, 0, -1]
    assert ROWS.num_rows(np.array(sizes)).tolist() == [-1, 1, 7, -1, -1, -1, -1]


def test_no_usable_replacement_ends_the_run(corpus):
    with pytest.raises(
        DataError, match=r"16 samples in a row cannot be used, at position 0, first train-.*120"
    ):
        reader_of(corpus, layout=RecordLayout(torch.uint8, {"first": (112,)})).read([0])


def test_a_shard_that_is_gone_or_changed_is_no_damaged_sample(corpus):
    tar = corpus / "train-00000.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(DataError, match="its manifest says") as caught:
        reader_of(corpus).read(range(NUM_SAMPLES))
    assert "\n" not in str(caught.value)
    tar.unlink()
    with pytest.raises(DataError, match="put the shard back"):
        list(reader_of(corpus).batches([range(NUM_SAMPLES)], num_threads=1))


def test_a_disk_that_is_gone_is_no_damaged_sample(corpus):
    reader = reader_of(corpus)
    reader.read(range(NUM_SAMPLES))
    fail_reads(corpus / "train-00000.tar")
    with pytest.raises(DataError, match=r"train-00000\.tar: cannot be read at byte \d+: Is a dir") as caught:
        reader.read(range(NUM_SAMPLES))
    assert not isinstance(caught.value, SampleError)


def test_files_do_not_stay_open(corpus, monkeypatch):
    monkeypatch.setattr("kandinsky_dist.data.record_slots.MAX_OPEN_SHARDS", 2)
    reader = reader_of(corpus)
    for _ in range(3):
        assert len(list(reader.batches(([n] for n in range(NUM_SAMPLES)), num_threads=1))) == NUM_SAMPLES
    assert len(open_tars(corpus)) == 2
    del reader
    assert open_tars(corpus) == []


def open_tars(corpus) -> list[str]:
    descriptors = Path("/proc/self/fd").iterdir()
    targets = (os.readlink(path) for path in descriptors if path.is_symlink())
    return [target for target in targets if target.startswith(str(corpus)) and target.endswith(".tar")]


def flip(corpus, order, place, *, bit: int) -> None:
    """Changes one bit in the middle of a record."""
    from kandinsky_dist.data.tables import Tables

    table = Tables(order.manifest)[place.shard]
    offset, size = table.index.members(table.row(place))["cached"]
    with open(order.manifest.tar(place.shard), "r+b") as tar:
        tar.seek(offset + size // 2)
        byte = tar.read(1)[0]
        tar.seek(offset + size // 2)
        tar.write(bytes([byte ^ bit]))
