"""Records survive the disk, and pages are what their records render."""

from pathlib import Path

import pytest

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.memory_report import fullest
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.render import Column, mib, percent, table
from kandinsky_dist.errors import DataError

DOCS = Path(__file__).parents[3] / "docs"


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    rows = [{"strategy": "zero2", "weights_bytes": 12}, {"strategy": "ddp", "weights_bytes": None}]
    record = Record.now("memory", device="CPU", command="bench memory OUT", setting={"n": 2}, rows=rows)
    record.save(tmp_path / "memory.json")
    assert Record.load(tmp_path / "memory.json") == record
    assert {"python", "torch"} <= set(record.versions)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"case": "memory"}'])
def test_what_is_no_record_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "memory.json"
    path.write_text(content)
    with pytest.raises(DataError, match="is not a bench record") as caught:
        Record.load(path)
    assert "\n" not in str(caught.value)


def test_a_case_nobody_can_render_is_named(tmp_path):
    path = tmp_path / "x.json"
    Record.now("speed_of_light", device="CPU", command="", setting={}, rows=[]).save(path)
    with pytest.raises(DataError, match="speed_of_light; known cases: memory"):
        to_markdown(path)


def test_table_is_aligned_and_numbers_stand_on_the_right():
    columns = [Column("name", lambda row: row[0], is_number=False), Column("MiB", lambda row: row[1])]
    assert table(columns, [("a", "1.0"), ("longer", "1,000.5")]) == (
        "| name   |     MiB |\n| ------ | ------: |\n| a      |     1.0 |\n| longer | 1,000.5 |\n"
    )


def test_figures_are_written_with_their_unit_in_mind():
    assert (mib(1536 * 2**20), mib(None), percent(0.0312), percent(-0.5)) == (
        "1,536.0",
        "-",
        "+3.1 %",
        "-50.0 %",
    )


def test_a_case_is_shown_by_its_fullest_rank_and_moment_outside_the_step():
    def row(rank: int, moment: str, num_bytes: int) -> dict[str, object]:
        sizes = dict.fromkeys(
            ("weights_bytes", "gradients_bytes", "masters_bytes", "moments_bytes"), num_bytes
        )
        return {
            "stage": "prior",
            "strategy": "zero1",
            "precision": "fp32",
            "rank": rank,
            "moment": moment,
        } | sizes

    rows = [
        row(0, "accumulating", 3),
        row(1, "accumulating", 5),
        row(0, "before the step", 4),
        row(1, "in the step", 9),
    ]
    assert [(item["rank"], item["moment"]) for item in fullest(rows)] == [(1, "accumulating")]


@pytest.mark.parametrize("record", sorted((DOCS / "records").glob("*.json")), ids=lambda path: path.stem)
def test_every_documented_page_is_what_its_record_renders(record):
    assert (DOCS / f"{record.stem}.md").read_text("utf-8") == to_markdown(record)
