"""The plan of `launch/gpu.sh`, its time keeping and its table."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.bench.gpu import memory, plan, report
from kandinsky_dist.bench.gpu.run import keep
from kandinsky_dist.bench.gpu.steps import Outcome, Processes, Step, budget, run_steps
from kandinsky_dist.bench.record import Record

TESTS = Path(__file__).parents[2]


def make_plan(scratch: Path, **changes):
    values = {"size": "full", "device_type": "cuda", "stages": ("prior", "decoder"), **changes}
    return plan.plan(scratch, TESTS, **{"is_there": lambda package: True, **values})


def step(name: str, least: float = 10, most: float = 100, **more) -> Step:
    return Step(name=name, command=("true",), least_seconds=least, most_seconds=most, **more)


class FakeRunner:
    """Steps that take a given time of a clock of its own, or their whole budget."""

    def __init__(self, durations: dict[str, float]) -> None:
        self.now, self.durations, self.is_closed = 0.0, durations, False

    def __call__(self, step: Step, budget_seconds: float) -> Outcome:
        seconds = min(self.durations[step.name], budget_seconds)
        self.now += seconds
        verdict = "passed" if seconds == self.durations[step.name] else "stopped"
        return Outcome(name=step.name, verdict=verdict, seconds=seconds, budget_seconds=budget_seconds)

    def close(self) -> None:
        self.is_closed = True

    def run(self, steps: list[Step], seconds: float) -> dict[str, Outcome]:
        outcomes = run_steps(
            steps, seconds=seconds, run=self, report=lambda outcomes: None, clock=lambda: self.now
        )
        return {outcome.name: outcome for outcome in outcomes}


def test_the_plan_has_the_most_important_first(tmp_path):
    assert [step.name for step in make_plan(tmp_path)] == [
        "networks and corpus",
        "pytest -m gpu",
        "prior beside baseline",
        "decoder beside baseline",
        "memory of a step",
    ]


def test_cases_are_compiled_cached_and_beside_the_baseline(tmp_path):
    (case,) = [step for step in make_plan(tmp_path, stages=("decoder",)) if "train" in step.command]
    words = " ".join(case.command)
    assert words.endswith("--vary data.source cached --parallel.precision bf16 --vary parallel.compile true")
    assert "--size full --stage decoder " in words
    assert "--no-baseline" not in words


def test_the_plan_finds_every_file_with_gpu_tests(tmp_path):
    words = next(step.command for step in make_plan(tmp_path) if step.name == plan.TESTS)
    assert {"test_cuda_paths.py", "test_float8_training.py", "test_meter.py"} <= {
        Path(word).name for word in words
    }


def test_least_times_of_the_plan_fit_into_its_usual_minutes(tmp_path):
    steps = make_plan(tmp_path)
    assert sum(step.least_seconds for step in steps) < 9 * 60
    assert all(step.least_seconds < step.most_seconds for step in steps)


@given(
    seconds=st.floats(0, 1000),
    times=st.lists(st.tuples(st.floats(0, 300), st.floats(0, 300), st.floats(0, 1000)), max_size=6),
)
def test_budgets_never_add_up_to_more_than_the_time(seconds, times):
    steps = [
        step(str(number), least, least + more)  # as plans have it: the most is not below the least
        for number, (least, more, _) in enumerate(times)
    ]
    runner = FakeRunner({str(number): duration for number, (*_, duration) in enumerate(times)})
    outcomes = runner.run(steps, seconds)
    assert len(outcomes) == len(steps)
    assert runner.now <= seconds * (1 + 1e-9)
    for item in steps:
        outcome = outcomes[item.name]
        assert outcome.seconds <= item.most_seconds
        if outcome.verdict != "left out":
            assert outcome.budget_seconds >= item.least_seconds


def test_a_step_leaves_later_ones_their_least_time():
    assert budget(step("a"), [step("b", least=30)], 90) == 60
    assert budget(step("a"), [step("b", least=30)], 500) == 100
    assert budget(step("a"), [step("b", least=30, missing=("x",))], 90) == 90
    # The more important step goes first where there is not enough for both.
    assert budget(step("a"), [step("b", least=30)], 35) == 10
    assert budget(step("a"), [], 9) == 0


def test_a_step_that_overruns_is_ended_and_the_next_one_goes_on():
    outcomes = FakeRunner({"slow": 1e6, "quick": 5}).run([step("slow"), step("quick")], 150)
    assert (outcomes["slow"].verdict, outcomes["slow"].seconds) == ("stopped", 100)
    assert outcomes["quick"].verdict == "passed"


def test_a_step_is_left_out_when_too_little_time_is_left():
    steps = [step("first", most=50), step("large", least=20), step("small", least=5)]
    outcomes = FakeRunner({"first": 50, "large": 1, "small": 1}).run(steps, 60)
    # "first" had to leave 25 s of the 60; a step that is passed over does not end the plan.
    assert outcomes["first"].verdict == "stopped"
    outcomes = FakeRunner({"first": 50, "large": 1, "small": 1}).run([steps[0], *steps[2:], steps[1]], 60)
    assert outcomes["large"].verdict == "passed"
    outcomes = FakeRunner({"first": 50, "large": 1, "small": 1}).run(steps, 15)
    assert outcomes["large"].verdict == "left out"
    assert outcomes["large"].note == "5 s were left, it needs 20 s"
    assert outcomes["small"].verdict == "passed"


def test_what_is_missing_leaves_a_step_out_and_those_that_need_it():
    steps = [step("made", missing=("diffusers", "webdataset")), step("used", after=("made",)), step("other")]
    outcomes = FakeRunner({"other": 1}).run(steps, 100)
    assert outcomes["made"].note == "missing on this machine: diffusers, webdataset"
    assert outcomes["used"].note == "needs the step 'made', which was left out"
    assert outcomes["other"].verdict == "passed"


def test_missing_packages_are_named(tmp_path):
    steps = make_plan(tmp_path, device_type="cpu", is_there=lambda package: package != "webdataset")
    missing = {step.name: step.missing for step in steps}
    assert missing[plan.TESTS] == ("a CUDA device", "webdataset")
    assert missing[plan.MEMORY] == ("webdataset",)
    nowhere = plan.plan(
        tmp_path, tmp_path, size="full", device_type="cuda", stages=(), is_there=lambda package: True
    )
    assert {step.name: step.missing for step in nowhere}[plan.TESTS] == ("the checkout's tests",)


def test_the_vocabulary_is_missing_only_where_pip_has_no_network_and_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    assert plan.missing_vocabulary() == ()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert plan.missing_vocabulary() == ("open_clip_torch's wheel",)
    (tmp_path / "open_clip_torch-3.3.0-py3-none-any.whl").touch()
    assert plan.missing_vocabulary() == ()


def test_a_background_step_is_waited_for_by_those_that_need_it():
    steps = [step("made", is_background=True), step("tests"), step("used", after=("made",))]
    reports = []
    runner = FakeRunner({"made": 1, "tests": 1, "used": 1})
    run_steps(steps, seconds=100, run=runner, report=reports.append, clock=lambda: 0.0)
    assert [[outcome.name for outcome in outcomes] for outcomes in reports] == [
        ["tests"],
        ["made", "tests"],
        ["made", "tests", "used"],
    ]


def test_an_interrupt_ends_what_is_running():
    runner = FakeRunner({})
    runner.__class__ = type("Interrupted", (FakeRunner,), {"__call__": interrupt})
    with pytest.raises(KeyboardInterrupt):
        runner.run([step("a")], 100)
    assert runner.is_closed


def interrupt(self, step, budget_seconds):
    raise KeyboardInterrupt


@pytest.fixture
def processes(tmp_path):
    """A runner of real processes that gives them a short grace."""
    made = Processes(tmp_path, tmp_path / "log", lambda step, output: (True, "fine"), grace_seconds=0.2)
    yield made
    made.close()


def shell(text: str, **more) -> Step:
    return Step(name="a step", command=("sh", "-c", text), least_seconds=0, most_seconds=9, **more)


def test_a_process_group_that_ignores_the_request_is_killed(processes, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    text = f"trap '' TERM; exec 3>{pipe}; echo begun >&3; sleep 1000 & wait; wait"
    outcome = processes(shell(text), 1.5)
    assert (outcome.verdict, outcome.note) == ("stopped", "did not end within its budget of 2 s")
    with open(reader) as file:
        assert file.read() == "begun\n"  # and then the end: nobody holds the other side any more


def test_a_command_that_fails_says_why(processes, tmp_path):
    outcome = processes(shell("echo begun; echo no memory; echo; exit 3"), 60)
    assert (outcome.verdict, outcome.note) == ("failed", "no memory")
    assert "==== a step: exit code 3" in (tmp_path / "log").read_text()


def test_a_record_of_an_earlier_step_is_not_taken_for_this_ones(processes, tmp_path):
    (tmp_path / "train.json").write_text("old")
    processes(shell("true", record=tmp_path / "train.json"), 60)
    assert not (tmp_path / "train.json").exists()


def row(**more):
    return {
        "case": "c", "note": "", "step_seconds": [2.0, 2.0], "baseline_seconds": [8.0, 8.0],
        "global_batch_size": 8, "samples_per_second": 4.0, "mfu": 0.5, "peak_memory_gib": 20.0, **more,
    }  # fmt: skip


def record(case: str, *rows, **setting) -> Record:
    return Record.now(case, device="GPU", command="c", setting=setting, rows=list(rows))


def test_records_are_kept_and_their_figures_shown(tmp_path):
    (tmp_path / "out").mkdir()
    trained = step("a", record=tmp_path / "train.json", kept_as="train_prior.json")
    assert keep(trained, "", tmp_path / "out") == (False, "the command wrote no record")
    (tmp_path / "train.json").write_text('{"case": ')
    assert keep(trained, "", tmp_path / "out") == (False, "the command wrote half a record")
    record("train", row(step_seconds=[8.0, 8.0]), row()).save(tmp_path / "train.json")
    assert keep(trained, "", tmp_path / "out") == (
        True,
        "4.0 samples/s, 4.00 x baseline, 50.0% of peak, 20.0 GiB",
    )
    assert Record.load(tmp_path / "out" / "train_prior.json").rows[1]["mfu"] == 0.5
    assert keep(step("tests"), "x\n=== 9 passed in 2s ===\n", tmp_path) == (True, "9 passed in 2s")


def test_a_case_that_broke_is_no_success():
    broken = record("train", row(), row(note="a process has ended: no memory", step_seconds=[]))
    assert report.figure_of(broken) == (False, "c: a process has ended: no memory")


def test_pages_name_every_step_and_every_stage():
    rows = [
        {"name": "a", "verdict": "passed", "seconds": 12.4, "budget_seconds": 60.0, "note": "4.0 samples/s"},
        {"name": "b", "verdict": "left out", "seconds": 0.0, "budget_seconds": 0.0, "note": "not | reached"},
    ]
    page = report.to_markdown(record("gpu", *rows, minutes=9))
    assert page.splitlines()[-2:] == [
        "| a    | passed   |      12 | 4.0 samples/s    |",
        "| b    | left out |       0 | not / reached    |",
    ]
    figures = {
        "stage": "prior", "strategy": "ddp", "precision": "bf16", "micro_batch_size": 64, "num_micro": 4,
        "measured_gib": 20.0, "estimated_gib": 21.0,
    }  # fmt: skip
    found = record("memory_gpu", figures)
    assert report.figure_of(found) == (True, "prior 20.0 GiB measured, 21.0 estimated")
    assert memory.to_markdown(found).splitlines()[-1].replace(" ", "") == (
        "|prior|ddp|bf16|64x4|20.00|21.00|+5.0%|"
    )
