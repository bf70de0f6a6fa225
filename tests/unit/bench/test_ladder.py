"""The cases that `bench train` makes of its arguments, and what it refuses."""

import pytest

from kandinsky_dist.bench import ladder, switches
from kandinsky_dist.bench.incumbent import check_followed
from kandinsky_dist.bench.ladder import BASELINE, Rung
from kandinsky_dist.bench.switches import LEVERS, Replacement
from kandinsky_dist.bench.train import combinations
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.bench.train_inputs import CAPTION_TOKENS, captions
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.token_lengths import token_counter

COMMON = {"data.shards": "/shards", "data.micro_batch_size": "4", "data.global_batch_size": "4"}


@pytest.fixture
def rungs(monkeypatch):
    """A ladder of our own."""

    def set_rungs(*rungs: Rung) -> None:
        monkeypatch.setattr(ladder, "RUNGS", rungs)

    return set_rungs


def prior_cases() -> tuple[list[Case], list[str]]:
    return ladder.cases(["prior"], {"prior": COMMON}, "cpu", 1)


def test_every_rung_stands_on_the_kept_ones_below(rungs):
    rungs(
        Rung(name="a", settings={"data.num_workers": "1"}, why=""),
        Rung(name="b", settings={"optim.weight_decay": "0.1"}, kept_on=("cuda",), why=""),
        Rung(name="c", settings={"parallel.precision": "bf16"}, why=""),
    )
    cases, left_out = prior_cases()
    assert [(case.name, case.added_to) for case in cases] == [
        (BASELINE, None),
        ("a", BASELINE),
        ("b", "a"),
        ("c", "a"),
    ]
    assert cases[3].settings == {"data.num_workers": "1", "parallel.precision": "bf16"}
    assert [case.is_beside for case in cases] == [False, False, True, False]
    assert left_out == []


def test_a_lever_that_is_on_by_default_is_off_below_its_rung_and_not_above(rungs):
    rungs(
        Rung(name="a", settings={"data.num_workers": "1"}, why=""),
        Rung(
            name="b",
            settings={"optim.max_grad_norm": "2"},
            off={"optim.max_grad_norm": "0", "a.b": ""},
            why="",
        ),
        Rung(name="c", settings={"data.num_workers": "2"}, why=""),
    )
    cases, _ = prior_cases()
    assert [case.settings.get("optim.max_grad_norm") for case in cases[1:]] == ["0", "2", "2"]


def test_a_rung_of_a_setting_that_does_not_exist_is_left_out_and_said_so(rungs):
    rungs(
        Rung(name="a", settings={"parallel.warp_drive": "true"}, why=""),
        Rung(name="b", settings={"data.source": "telepathy"}, why=""),
        Rung(name="c", settings={"data.num_workers": "1"}, why=""),
    )
    cases, left_out = prior_cases()
    assert [case.name for case in cases] == [BASELINE, "c"]
    assert left_out == [
        "prior, a: there is no parallel.warp_drive=true",
        "prior, b: there is no data.source=telepathy",
    ]


def test_a_lever_that_is_always_on_is_taken_from_the_rungs_below(rungs, monkeypatch):
    monkeypatch.setitem(LEVERS, "steps", (Replacement("kandinsky_dist.bench.ladder", "_is_known", bool),))
    rungs(
        Rung(name="a", settings={"data.num_workers": "1"}, why=""),
        Rung(name="b", brings="steps", why=""),
        Rung(name="c", settings={"data.num_workers": "2"}, why=""),
    )
    cases, _ = prior_cases()
    assert [case.without for case in cases] == [(), ("steps",), (), ()]


def test_a_lever_with_a_part_missing_is_no_rung(rungs, monkeypatch):
    here = Replacement("kandinsky_dist.bench.ladder", "_is_known", bool)
    monkeypatch.setitem(LEVERS, "steps", (here, Replacement("kandinsky_dist.bench.nowhere", "f", bool)))
    rungs(Rung(name="b", brings="steps", why=""))
    cases, left_out = prior_cases()
    assert [case.name for case in cases] == [BASELINE]
    assert left_out == ["prior, b: there is no steps"]


def test_a_lever_is_turned_off_by_what_stands_in_for_it(monkeypatch):
    monkeypatch.setattr(ladder, "_is_known", ladder._is_known)  # restored afterwards
    monkeypatch.setitem(LEVERS, "steps", (Replacement("kandinsky_dist.bench.ladder", "_is_known", bool),))
    switches.turn_off("steps")
    assert ladder._is_known is bool


def test_a_rung_that_cannot_work_here_is_left_out_with_the_reason(rungs):
    rungs(
        Rung(
            name="a", settings={"parallel.gradient_compression": "bf16", "parallel.strategy": "zero1"}, why=""
        ),
        Rung(name="b", settings={"data.num_workers": "1"}, why=""),
    )
    cases, left_out = prior_cases()
    assert [(case.name, case.added_to) for case in cases] == [(BASELINE, None), ("b", BASELINE)]
    assert left_out == [
        "prior, a: parallel.gradient_compression=bf16 needs parallel.strategy=ddp, it is zero1"
    ]


def test_common_settings_that_cannot_work_are_no_reason_to_leave_rungs_out():
    with pytest.raises(ConfigError, match=r"data\.global_batch_size=5 must be a multiple"):
        ladder.cases(["prior"], {"prior": {**COMMON, "data.global_batch_size": "5"}}, "cpu", 1)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_rung_here_works_or_lacks_a_package_or_bf16(stage, device):
    cases, left_out = ladder.cases([stage], {stage: COMMON}, device, 1)
    assert len(cases) + len(left_out) == 1 + sum(
        stage in rung.stages and device in rung.devices for rung in ladder.RUNGS
    )
    for reason in left_out:
        assert "needs the package" in reason or reason.endswith("+ bf16: there is no bf16 in this processor")


def test_combinations_are_every_value_with_every_other():
    cases = combinations(
        "prior",
        COMMON,
        [["parallel.strategy", "ddp", "fsdp2"], ["data.micro_batch_size", "2", "8"]],
        world_size=2,
    )
    assert cases[0].name == "strategy=ddp, micro_batch_size=2, global_batch_size=4"
    assert [
        (case.config.parallel.strategy, case.config.data.micro_batch_size, case.config.data.global_batch_size)
        for case in cases
    ] == [("ddp", 2, 4), ("ddp", 8, 16), ("fsdp2", 2, 4), ("fsdp2", 8, 16)]


def test_combinations_have_the_micro_batches_of_the_baseline():
    common = {**COMMON, "data.micro_batch_size": "4", "data.global_batch_size": "24"}
    (case,) = combinations("prior", common, [["data.micro_batch_size", "2"]], world_size=2)
    assert case.config.data.global_batch_size == 2 * 3 * 2, "three of a rank"


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([["run.seed"]], r"--vary run\.seed needs a key and one or more values, each once"),
        (
            [["run.seed", "1", "2", "1"]],
            r"--vary run\.seed 1 2 1 needs a key and one or more values, each once",
        ),
        ([["run.seed", "1"], ["run.seed", "2"]], "--vary names a key twice"),
    ],
)
def test_cases_that_would_be_the_same_or_none_are_refused(vary, message):
    with pytest.raises(ConfigError, match=message):
        combinations("prior", COMMON, vary, world_size=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.variant", "lora"),
        ("objective.snr_gamma", "5"),
        ("data.caption_dropout", "0.1"),
        ("optim.ema_decay", "[0.9]"),
        ("parallel.gradient_checkpointing", "true"),
    ],
)
def test_the_baseline_refuses_work_that_it_cannot_do(key, value):
    case = Case(name=BASELINE, stage="prior", way="incumbent", common={**COMMON, key: value})
    with pytest.raises(ConfigError, match=rf"^{key}=.*--no-baseline$"):
        check_followed(case.resolved())


def test_the_baseline_takes_what_only_says_how_the_work_is_done():
    more = {
        "data.num_workers": "4",
        "parallel.strategy": "ddp",
        "parallel.precision": "bf16",
        "run.seed": "3",
    }
    check_followed(Case(name=BASELINE, stage="prior", way="incumbent", common={**COMMON, **more}).resolved())


def test_captions_have_the_lengths_of_real_ones(tiny_models):
    lengths = token_counter(tiny_models / "prior")(captions(200))
    assert (min(lengths), max(lengths)) == CAPTION_TOKENS
    assert [len(text.split()) + 2 for text in captions(200)] == lengths, "every word is one token"
