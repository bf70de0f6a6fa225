"""What the records of `bench train` and `bench scaling` say, and what they are rendered as."""

import re
from pathlib import Path

import pytest

from kandinsky_dist.bench import performance, scaling_report, train_report
from kandinsky_dist.bench.parts import PARTS
from kandinsky_dist.bench.record import Record
from kandinsky_dist.bench.train_case import Case, merged, row_of

DOCS = Path(__file__).parents[3] / "docs"


def make_row(case: str, seconds: list[float], **more) -> dict:
    """A row as `row_of` makes them, of 8 samples a step."""
    row = {
        "stage": "prior", "case": case, "way": "ours", "added_to": None, "is_beside": False, "settings": {},
        "without": [], "world_size": 1, "strategy": "ddp", "global_batch_size": 8, "micro_batch_size": 8,
        "precision": "float32", "threads_per_rank": 2, "step_seconds": seconds,
        "baseline_seconds": [8.0, 4.0, 2.0], "samples_per_second": 8 / sorted(seconds or [1, 1])[1],
        "first_loss": 1.25, "parts": dict.fromkeys(PARTS, 0.0), "peak_memory_gib": 1.0,
        "gflop_per_sample": 31.25, "tflops_per_second": 0.5, "mfu": None, "note": "",
    }  # fmt: skip
    return {**row, **more}


INCUMBENT = make_row("the incumbent's way", [8.0, 4.0, 2.0], way="incumbent")
LIVE = make_row("live", [4.0, 2.0, 1.0], added_to=INCUMBENT["case"], why="what it is")
SLOWER = make_row("slower", [8.0, 4.0, 2.0], added_to="live", is_beside=True, why="a bad idea")
CACHED = make_row(
    "cached", [0.8, 0.5, 0.2], added_to="live", settings={"data.source": "cached"}, why="a good one"
)


def make_record(*rows: dict, case: str = "train", **setting) -> Record:
    common = {
        "num_warmup": 2, "num_steps": 3, "num_repeats": 3, "num_alive": 0, "most_times": 4, "size": "small",
        "device_type": "cpu", "settings": {}, "corpus": None, "world_size": 1, "left_out": [],
        "has_ladder": True, "shares_cores": True, "seconds": 90.0,
    }  # fmt: skip
    return Record.now(case, device="CPU x", command="c", setting={**common, **setting}, rows=list(rows))


def cells(page: str, first: str) -> list[str]:
    """The cells of the first table row that begins so."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def aims_of(folder: Path) -> str:
    """The page's aims, without spaces."""
    return performance.to_markdown(folder).split("## Aims")[1].replace(" ", "")


def test_a_ratio_is_the_median_of_those_within_each_round():
    # 10, 8 and 10 times; the medians of the seconds alone would say 8.
    assert train_report.ratios(CACHED, INCUMBENT) == pytest.approx([10.0, 8.0, 10.0])
    assert train_report.ratio(CACHED, INCUMBENT) == pytest.approx(10.0)


def test_a_ratio_is_one_of_samples_whatever_the_batch():
    large = make_row("large", [8.0, 4.0, 2.0], global_batch_size=32)
    assert train_report.ratio(large, INCUMBENT) == pytest.approx(4.0)


def test_a_rung_is_compared_with_the_one_that_it_was_added_to_not_with_what_was_tried_beside():
    rows = [INCUMBENT, LIVE, SLOWER, CACHED]
    page = train_report.to_markdown(make_record(*rows))
    assert cells(page, "live")[1:5] == ["4.00", "2.00", "2.00 to 2.00", "2.00"]
    assert cells(page, "(slower)")[4] == "0.50"
    assert cells(page, "cached")[2:5] == ["10.00", "8.00 to 10.00", "5.00"]


def test_a_case_that_failed_is_a_line_with_its_reason():
    failed = make_row("broken", [], baseline_seconds=[], note="a process has ended: no memory")
    for name in ("samples_per_second", "first_loss", "parts", "peak_memory_gib", "tflops_per_second"):
        failed.pop(name)  # as in a case that had no turn
    page = train_report.to_markdown(make_record(INCUMBENT, failed))
    assert cells(page, "broken")[1:4] == ["-", "-", "-"]
    assert cells(page, "broken")[-1] == "a process has ended: no memory"


def test_what_a_step_waits_for_communication_is_its_time_less_that_without():
    talking = make_row(
        "two ranks", [4.0, 2.0, 1.0], reduced_seconds=[1.0, 1.5, 2.0], silent_seconds=[1.0, 1.2, 1.4]
    )
    assert train_report.exposed_seconds(talking) == pytest.approx(0.3)
    page = train_report.to_markdown(make_record(INCUMBENT, talking))
    assert page.split("time goes", 1)[1].count("| communication |") == 1
    assert re.search(r"two ranks .* 300.0 \|", page)


def test_ranks_results_are_the_slowest_ones():
    def result(seconds: float, loss: float, memory: float, **more) -> dict:
        parts = dict.fromkeys(PARTS, 4 * seconds)
        return {
            "step_seconds": seconds,
            "parts": parts,
            "first_loss": loss,
            "peak_memory_gib": memory,
            **more,
        }

    found = merged([result(1.0, 1.0, 5.0, tflops_per_second=3.0), result(2.0, 2.0, 4.0)], 4)
    assert found["step_seconds"] == 2.0
    assert found["parts"]["forward"] == 2.0
    assert (found["first_loss"], found["peak_memory_gib"], found["tflops_per_second"]) == (1.5, 5.0, 3.0)


def test_a_row_keeps_every_repeat():
    case = Case(
        name="x",
        stage="prior",
        common={"data.shards": "s", "data.global_batch_size": "4", "data.micro_batch_size": "2"},
    )
    repeats = [
        {"step_seconds": s, "baseline_seconds": 2 * s, "parts": {"data": s}, "peak_memory_gib": s}
        for s in (1.0, 4.0, 2.0)
    ]
    row = row_of(case, {"precision": "float32"}, repeats)
    assert row["step_seconds"] == [1.0, 4.0, 2.0]
    assert row["baseline_seconds"] == [2.0, 8.0, 4.0]
    assert (row["samples_per_second"], row["parts"]["data"], row["peak_memory_gib"]) == (2.0, 2.0, 4.0)
    assert (row["global_batch_size"], row["micro_batch_size"], row["precision"]) == (4, 2, "float32")


@pytest.mark.parametrize(("shares_cores", "expected"), [(True, "200.0%"), (False, "50.0%")])
def test_efficiency_knows_whether_ranks_have_devices_of_their_own(shares_cores, expected):
    one = make_row("1", [8.0, 4.0, 2.0], mode="weak")
    four = make_row("4", [8.0, 8.0, 8.0], mode="weak", world_size=4, global_batch_size=32)
    record = make_record(one, four, case="scaling", shares_cores=shares_cores)
    page = scaling_report.to_markdown(record)
    row = next(line for line in page.splitlines() if re.match(r"\| ddp +\| weak +\| +4 ", line))
    assert expected in row, page


def test_the_page_about_performance_renders_a_folder(tmp_path):
    make_record(INCUMBENT, LIVE, SLOWER, CACHED, left_out=["prior, + x: there is no y=1"]).save(
        tmp_path / "cpu.json"
    )
    weak = [make_row(str(n), [8.0, 4.0, 2.0], mode="weak", world_size=n) for n in (1, 2)]
    make_record(*weak, case="scaling").save(tmp_path / "scaling.json")
    page, aims = performance.to_markdown(tmp_path), aims_of(tmp_path)
    assert "|CPUx|prior|live|1.2timestheincumbent|2.00|3|live|yes|" in aims
    assert "|CPUx|prior|cached|10timestheincumbent|10.00|3|cached|yes|" in aims
    without = " ".join(page.split("## What did not help")[1].split("##")[0].split())
    assert without.startswith("- **slower** (prior, size small, CPU x): 0.50 times the rate of what it was")
    assert "cached" not in without
    assert "Left out: prior, + x" in page
    assert "## Scaling on CPU x" in page


def test_a_picture_beside_its_record_is_shown(tmp_path):
    for folder, link in (
        (tmp_path / "out", "cpu.png"),
        (tmp_path / "docs/records/performance", "records/performance/cpu.png"),
    ):
        folder.mkdir(parents=True)
        make_record(INCUMBENT, LIVE).save(folder / "cpu.json")
        assert "![" not in performance.to_markdown(folder)
        (folder / "cpu.png").touch()
        assert f"![Samples a second]({link})\n" in performance.to_markdown(folder)


def test_aims_are_judged_beside_the_ladder_where_cases_have_more_turns(tmp_path):
    make_record(INCUMBENT, LIVE, CACHED).save(tmp_path / "a.json")
    make_record(INCUMBENT, CACHED, has_ladder=False, num_repeats=9).save(tmp_path / "b.json")
    aims = aims_of(tmp_path)
    assert aims.count("|CPUx|prior|live|") == 1
    assert "|CPUx|prior|cached|10timestheincumbent|10.00|3|cached|yes|" in aims
    assert "|CPUx|prior|cached|10timestheincumbent|10.00|9|cached|yes|" in aims


def test_an_aim_that_was_missed_says_so(tmp_path):
    slow = make_row("cached", [4.0, 2.0, 1.0], settings={"data.source": "cached"})
    other_arithmetic = make_row(
        "bf16", [0.1, 0.1, 0.1], settings={"data.source": "cached"}, precision="bfloat16"
    )
    make_record(INCUMBENT, slow, other_arithmetic).save(tmp_path / "cpu.json")
    page = performance.to_markdown(tmp_path)
    assert "|CPUx|prior|cached|10timestheincumbent|2.00|3|cached|no|" in page.replace(" ", ""), page


def test_aims_on_a_gpu_are_shares_of_its_peak_too(tmp_path):
    make_record(INCUMBENT, LIVE).save(tmp_path / "cpu.json")
    assert "|aGPU|prior|cached|55%ofthepeak|-|-|norecordyet|-|" in aims_of(tmp_path)
    quick, cached = {"settings": {"data.source": "cached"}, "precision": "bfloat16"}, [0.8, 0.5, 0.2]
    rows = [
        {**INCUMBENT, "precision": "bfloat16"},
        make_row("live", cached, mfu=0.9, precision="bfloat16"),
        make_row("cached", cached, mfu=0.56, **quick),
        make_row("float8", cached, mfu=0.7, is_beside=True, **quick),
    ]
    make_record(*rows, device_type="cuda").save(tmp_path / "gpu.json")
    aims = aims_of(tmp_path)
    assert "|prior|cached|55%ofthepeak|56.0%|3|cached|yes|" in aims
    assert "|prior|cached|15timestheincumbent|10.00|3|cached|no|" in aims
    assert "norecordyet" not in aims


def test_the_documented_page_is_what_its_records_render():
    assert (DOCS / "performance.md").read_text("utf-8") == performance.to_markdown(
        DOCS / "records" / "performance"
    )
