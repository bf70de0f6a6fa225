"""What docs/precision.md says about number formats is what two real ranks use."""

from pathlib import Path

import pytest
from dist.precision_programs import types_of_all
from helpers.forked import run_on_ranks

from kandinsky_dist.bench.render import Column, table

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
AUTOCASTING = ("ddp", "zero0")
"""There torch's autocast decides how norm layers compute, and decides otherwise on a GPU than on a CPU."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"
ALWAYS_FP32 = ("noised samples", "loss", "norm", "masters and moments", "averages", "checkpoint")
VARYING = ("weights", "products", "norm layers", "gradients", "reduced")

Types = dict[tuple[str, str, str], dict[str, str]]


@pytest.fixture(scope="module")
def types(tmp_path_factory) -> Types:
    """Stage, strategy and precision -> what is in which type, on both ranks alike."""
    cases = [
        (stage, strategy, precision)
        for strategy in STRATEGIES  # zero3 last: it changes torch for the rest of the process
        for stage, precisions in (("prior", ("fp32", "bf16", "fp16")), ("decoder", ("fp16",)))
        for precision in precisions
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        first, second = run_on_ranks(types_of_all, 2, cases, tmp_path_factory.mktemp("types"))
    assert first == second
    return dict(zip(cases, first, strict=True))


def test_what_stays_in_fp32_does_so_everywhere(types):
    for case, found in types.items():
        assert {found[kind] for kind in ALWAYS_FP32} == {"fp32"}, case
        if case[-1] == "fp32":
            assert set(found.values()) == {"fp32"}, case


def test_the_table_is_what_is_measured(types):
    """In bf16 and fp16 alike, for both networks; the page says "16 bits" for either."""
    rows = []
    for strategy in STRATEGIES:
        versions = [
            {kind: value.replace(precision, "16 bits") for kind, value in found.items()}
            for (_, name, precision), found in types.items()
            if name == strategy and precision != "fp32"
        ]
        assert versions == [versions[0]] * 3, versions
        (row,) = versions[:1]
        assert row["attention"] == row["products"] == "16 bits"
        if strategy in AUTOCASTING:
            row["norm layers"] = "autocast's"
        rows.append({"strategy": strategy, **row})
    columns = [
        Column(name, lambda row, name=name: row[name], is_number=False) for name in ("strategy", *VARYING)
    ]
    expected = table(columns, rows)
    assert expected in PAGE.read_text("utf-8"), expected
