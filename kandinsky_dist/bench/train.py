"""`bench train`: samples a second of whole training steps, by case, and where the time of a step goes.

Every case is a training of its own in processes that stay; the cases take turns, so that a machine that slows
down does so for all. What is compared with the first case was measured in the same rounds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from kandinsky_dist.bench import ladder, train_picture
from kandinsky_dist.bench.incumbent import check_followed
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.bench.train_inputs import (
    SHAPES,
    about_corpus,
    cached_shards,
    make_corpus,
    make_models,
)
from kandinsky_dist.bench.train_measure import Plan, check_plan, device_of, measure
from kandinsky_dist.bench.train_report import to_markdown
from kandinsky_dist.config.schema import Stage
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import Size

PACKAGES = ("transformers", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is trained.

    Attributes:
        size: of the random networks; of the corpus too where none is given.
        models: folder with prior/ and decoder/, or None.
        shards: as data.shards, or None.
        settings: of all cases, dotted keys.
    """

    size: Size
    models: Path | None
    shards: str | None
    settings: Mapping[str, str]


def run(
    out: Path,
    plan: Plan,
    inputs: Inputs,
    *,
    stages: Sequence[Stage],
    vary: Sequence[Sequence[str]],
    with_baseline: bool,
    world_size: int,
) -> Record:
    """Measures; writes OUT/train.json, train.md and train.png, and prints the page.

    Args:
        out: folder; networks and corpus are made in it too, and found there by the next call.
        plan: how.
        inputs: what.
        stages: networks.
        vary: a key and its values each: a case for every combination. Without any, the ladder.
        with_baseline: whether the incumbent's way is measured too.
        world_size: ranks of each case.

    Raises:
        ConfigError: a case cannot work as given.
    """
    train_picture.require_matplotlib()
    check_plan(plan)
    begin = time.monotonic()
    common = make_inputs(out, inputs, stages, world_size)
    device = device_of(world_size)
    cases, left_out = ladder.cases(stages, common, device, world_size)
    if vary:
        baselines = {case.stage: case for case in cases if case.way == "incumbent"}
        cases, left_out = [], []
        for stage in stages:
            cases += [baselines[stage], *combinations(stage, common[stage], vary, world_size)]
    if not with_baseline:
        cases = [case for case in cases if case.way != "incumbent"]
    cases = checked(cases, out, inputs)
    rows = [
        row for stage in stages for row in measure([case for case in cases if case.stage == stage], plan, out)
    ]
    words = [
        f"--size {inputs.size} --stage {' '.join(stages)} --world-size {world_size}",
        *(f"--vary {' '.join(words)}" for words in vary),
        *(["--no-baseline"] if not with_baseline else []),
    ]
    setting: dict[str, Any] = {"world_size": world_size, "left_out": left_out, "has_ladder": not vary}
    setting["seconds"] = time.monotonic() - begin
    return save(out, "train", plan, inputs, rows, words, setting, to_markdown, train_picture.draw)


def make_inputs(
    out: Path, inputs: Inputs, stages: Sequence[Stage], world_size: int
) -> dict[Stage, dict[str, str]]:
    """Makes networks and corpus where they are not given; the settings that all cases of a stage share."""
    out.mkdir(parents=True, exist_ok=True)
    models = make_models(out, inputs.size, inputs.models)
    shards = inputs.shards or str(make_corpus(out, inputs.size, models))
    found: dict[Stage, dict[str, str]] = {}
    for stage in stages:
        mine = {key: value for key, value in inputs.settings.items() if ladder.applies(key, stage)}
        values = {**SHAPES[inputs.size].settings[stage], **mine}
        num_micro = SHAPES[inputs.size].num_micro
        samples = int(values["data.micro_batch_size"]) * num_micro * max(1, world_size)
        values.setdefault("data.global_batch_size", str(samples))
        found[stage] = {
            "model.prior": str(models / "prior"),
            "model.decoder": str(models / "decoder"),
            "data.shards": shards,
            **values,
        }
    return found


def combinations(
    stage: Stage, common: Mapping[str, str], vary: Sequence[Sequence[str]], world_size: int
) -> list[Case]:
    """A case for every combination of the values of the keys."""
    if len({words[0] for words in vary}) < len(vary):
        raise ConfigError("--vary names a key twice: give all of its values at once")
    for words in vary:
        if len(words) < 2 or len(set(words)) < len(words):
            raise ConfigError(f"--vary {' '.join(words)} needs a key and one or more values, each once")
    found = []
    of_a_rank = int(common["data.global_batch_size"]) // world_size
    num_micro = max(1, of_a_rank // int(common["data.micro_batch_size"]))
    for values in product(*(words[1:] for words in vary)):
        settings = dict(zip((words[0] for words in vary), values, strict=True))
        micro = settings.get("data.micro_batch_size")
        if micro is not None and "data.global_batch_size" not in settings:
            settings["data.global_batch_size"] = str(int(micro) * num_micro * world_size)
        name = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in settings.items())
        found.append(Case(name=name, stage=stage, common=common, settings=settings, world_size=world_size))
    return found


def checked(cases: Sequence[Case], out: Path, inputs: Inputs) -> list[Case]:
    """The cases, those on cached encoders with their shards, which are made where they are missing.

    Shards that were given for cases that all are on cached encoders are such shards already.

    Raises:
        ConfigError: a case cannot work, or the baseline cannot do what it is compared with.
    """
    for case in cases:
        resolved = case.resolved()
        if case.way == "incumbent":
            check_followed(resolved)
    found = []
    for case in cases:
        is_made = inputs.shards is None or "data.source" in case.settings
        if case.way == "ours" and is_made and case.config.data.source == "cached":
            shards = cached_shards(out, case.stage, {**case.common, **case.settings})
            case = replace(case, common={**case.common, "data.shards": str(shards)})
        found.append(case)
    return found


def save(
    out: Path,
    name: str,
    plan: Plan,
    inputs: Inputs,
    rows: list[dict[str, Any]],
    words: Sequence[str],
    setting: Mapping[str, Any],
    page: Callable[[Record], str],
    picture: Callable[[Record], bytes],
) -> Record:
    """Writes OUT/NAME.json, NAME.md and NAME.png, and prints the page.

    Args:
        words: of the command that are its own.
        setting: of the record, beside that of plan and inputs.
    """
    given = [f"--{key} {value}" for key, value in inputs.settings.items()]
    places = [f"--{key} {key.upper()}" for key in ("models", "shards") if getattr(inputs, key) is not None]
    how = (
        f"--warmup {plan.num_warmup} --steps {plan.num_steps} --repeats {plan.num_repeats} "
        f"--alive {plan.num_alive}"
    )
    device = device_of(max(row["world_size"] for row in rows))
    record = Record.now(
        name,
        device=device_name(device),
        command=" ".join([f"kandinsky-dist bench {name} OUT", *words, how, *places, *given]),
        setting={
            **asdict(plan),
            "size": inputs.size,
            "device_type": device,
            "settings": dict(inputs.settings),
            "corpus": None if inputs.shards else about_corpus(inputs.size),
            **setting,
        },
        rows=rows,
        packages=PACKAGES,
    )
    record.save(out / f"{name}.json")
    (out / f"{name}.md").write_text(page(record), "utf-8")
    (out / f"{name}.png").write_bytes(picture(record))
    print(page(record), end="")
    return record
