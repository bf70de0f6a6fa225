"""Measured steps of several ranks beside the model of time, on paper and on all records here."""

from pathlib import Path

import pytest

from kandinsky_dist.bench.forecast_check import measured_rows, predicted, records_below, traffic
from kandinsky_dist.bench.forecast_inputs import compute_of, links_of
from kandinsky_dist.bench.record import Record
from kandinsky_dist.config.loader import Layer, load
from kandinsky_dist.errors import DataError

RECORDS = Path(__file__).parents[3] / "docs" / "records"
TOLERANCE = 0.15


def record(case, rows, device="CPU", **setting):
    setting = {"device_type": "cpu", **setting}
    return Record.now(case, device=device, command=f"bench {case}", setting=setting, rows=rows)


def comm(device="CPU"):
    """Every byte of an all-reduce between two ranks takes a nanosecond."""
    rows = [
        {
            "kind": "collective",
            "collective": name,
            "dtype": "fp32",
            "num_bytes": size,
            "seconds": [size * 1e-9],
        }
        for name in ("all-reduce", "reduce-scatter", "all-gather")
        for size in (4096, 2**24)
    ]
    return record("comm", rows, device, world_size=2)


def row(num_ranks, seconds, *, strategy="ddp", mode="weak", total=None, **more):
    return {
        "stage": "prior",
        "way": "ours",
        "strategy": strategy,
        "mode": mode,
        "world_size": num_ranks,
        "micro_batch_size": 2,
        "global_batch_size": total or 2 * num_ranks,
        "precision": "float32",
        "step_seconds": seconds,
        "parts": {"optimizer": 0.1},
        "settings": {},
        **more,
    }


def test_ranks_that_share_cores_do_their_work_one_after_the_other():
    rows = [row(1, [0.4, 0.5, 9.0]), row(2, [1.2])]
    (found,) = predicted(record("scaling", rows, size="tiny", shares_cores=True), links_of(comm()))
    exchanged = 4 * traffic("prior", "tiny", "fp32").num_trained * 1e-9
    assert found["measured_seconds"] == 1.2
    assert found["predicted_seconds"] == pytest.approx(2 * 0.5 + exchanged)


def test_strong_scaling_shares_micro_batches_and_zero_the_update():
    rows = [
        row(1, [0.9], strategy="zero1", mode="strong", total=4),
        row(2, [0.6], strategy="zero1", mode="strong", total=4),
    ]
    (found,) = predicted(record("scaling", rows, size="tiny", shares_cores=True), links_of(comm()))
    moved = 2 * 4 * traffic("prior", "tiny", "fp32").num_trained * 1e-9
    assert found["predicted_seconds"] == pytest.approx(0.8 + 0.1 + moved)


def test_devices_of_their_own_hide_communication():
    rows = [row(1, [0.5]), row(2, [0.5])]
    (found,) = predicted(record("scaling", rows, size="tiny", shares_cores=False), links_of(comm()))
    exchanged = 4 * traffic("prior", "tiny", "fp32").num_trained * 1e-9
    assert found["predicted_seconds"] == pytest.approx(0.5 + exchanged), "one bucket, nothing to hide behind"


def test_on_a_cpu_the_exchange_comes_on_top_of_what_ranks_compute_beside_each_other():
    together = row(2, [9.0], reduced_seconds=[0.8, 0.9], silent_seconds=[0.6, 0.7])
    rows = [row(1, [0.5]), together]
    exchanged = 4 * traffic("prior", "tiny", "fp32").num_trained * 1e-9
    for shares_cores in (False, True):
        setting = {"size": "tiny", "shares_cores": shares_cores}
        (found,) = predicted(record("scaling", rows, **setting), links_of(comm()))
        assert found["measured_seconds"] == pytest.approx(0.85)
        assert found["predicted_seconds"] == pytest.approx(0.65 + exchanged)
        (found,) = predicted(record("scaling", rows, device_type="cuda", **setting), links_of(comm()))
        assert found["measured_seconds"] == 9.0


def test_a_row_without_one_of_a_single_rank_is_left_out():
    rows = [row(1, [0.5]), row(2, [0.5], strategy="zero1"), row(2, [])]
    assert predicted(record("scaling", rows, size="tiny", shares_cores=True), links_of(comm())) == []


def test_another_machines_collectives_do_not_count():
    scaling = record("scaling", [row(1, [0.5]), row(2, [0.5])], size="tiny", shares_cores=True)
    with pytest.raises(DataError, match="was measured on CPU, and no record of bench comm was"):
        measured_rows([scaling], [comm("2 x NVIDIA H100")])
    assert len(measured_rows([scaling], [comm("2 x NVIDIA H100"), comm()])) == 1


def prior(**settings):
    return load("prior", None, [Layer("test", settings)]).config


def test_computing_is_that_of_the_quickest_rows_of_one_rank():
    rows = [
        row(1, [0.5], total=2),
        row(1, [0.9], total=2),
        row(1, [0.9], total=4, micro_batch_size=4),
        row(2, [0.1]),
        row(1, [0.1], way="incumbent"),
        row(1, [0.1], settings={"data.source": "cached"}),
        {**row(1, [0.1]), "stage": "decoder"},
        row(1, []),
    ]
    found = compute_of(record("train", rows, settings={}), prior())
    assert found.seconds(2) == pytest.approx(0.5)
    assert found.seconds(8) == pytest.approx(1.7)
    cached = compute_of(record("train", rows, settings={}), prior(**{"data.source": "cached"}))
    assert cached.seconds(2) == pytest.approx(0.1)


def test_accumulation_is_divided_out():
    found = compute_of(record("train", [row(1, [2.0], total=8)], settings={}), prior())
    assert found.seconds(2) == pytest.approx(0.5)


def test_what_a_record_does_not_say_is_said():
    with pytest.raises(
        DataError, match=r"has no row of one rank that trains the prior with data\.source=raw"
    ):
        compute_of(record("train", [row(2, [0.5])], settings={}), prior())
    with pytest.raises(DataError, match="a record of bench train knows no collectives"):
        links_of(record("train", []))


SCALING = records_below(RECORDS, "scaling")


@pytest.mark.skipif(not SCALING, reason="docs/records has no record of bench scaling yet")
def test_every_measured_step_is_predicted_within_15_percent():
    rows = measured_rows(SCALING, records_below(RECORDS, "comm"))
    off = {
        tuple(str(row[key]) for key in ("device", "stage", "strategy", "mode", "num_ranks")): (
            row["predicted_seconds"] / row["measured_seconds"] - 1
        )
        for row in rows
    }
    assert rows
    assert all(abs(value) <= TOLERANCE for value in off.values()), off
