"""Encoder outputs from the command line: what they are, who makes them, and training on them."""

import gc
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.campaign import cases as split
from helpers.command import keys, losses, metrics
from helpers.lines import one_line
from helpers.objective import batch_at, configuration, loader_of
from helpers.pictures import damage_samples, write_corpus
from helpers.servers import http_server

from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.manifest import MANIFEST_NAME
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.tables import Place, Tables
from kandinsky_dist.train import build, corpora

pytestmark = pytest.mark.dist

STOPPED, CONFIGURATION = 75, 78
NUM_KILLS = 2 * int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "1"))
BATCH = 12
SETTINGS = (f"data.global_batch_size={BATCH}", "data.micro_batch_size=2")
CASES = {
    "prior": ("data.caption_dropout=0.3", "data.horizontal_flip=0.5"),
    "decoder": ("data.resolution=64", "data.image_embedding_dropout=0.3", "data.horizontal_flip=0.5"),
    "buckets": ("data.resolution=192", "data.aspect_buckets=true"),
}
VIEWS = ("data.resolution", "data.aspect_buckets")
HALF_PRECISION = 2e-3
"""Relative. Outputs are rounded by up to 5e-4 of their size; losses differ by less."""


def stage_of(case: str) -> str:
    return "prior" if case == "prior" else "decoder"


def words(case: str, models: Path, shards: Path, out: Path, *more: str) -> list[str]:
    """What follows `kandinsky-dist`."""
    views = [setting for setting in CASES[case] if setting.split("=")[0] in VIEWS]
    settings = (
        f"model.prior={models / 'prior'}",
        f"model.decoder={models / 'decoder'}",
        f"data.shards={shards}",
        *views,
    )
    flip = ["--flip"] if "data.horizontal_flip=0.5" in CASES[case] else []
    arguments = [f"--{setting}" for setting in settings]
    return ["precompute", stage_of(case), *arguments, f"--out={out}", "--batch-size=5", *flip, *more]


def precompute(*arguments, **options) -> str:
    done = forked.command(*words(*arguments), **options)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def cached(tiny_models, small_corpus, tmp_path_factory):
    """Case -> folder with train/ and validation/ of encoder outputs, made when it is first asked for."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            for part in ("train",) if case == "buckets" else ("train", "validation"):
                precompute(case, tiny_models, small_corpus / part, made[case] / part)
        return made[case]

    return make


@pytest.mark.parametrize("case", ["prior", "decoder"])
def test_training_on_outputs_loses_what_training_on_images_loses(
    case, tiny_models, small_corpus, cached, tmp_path
):
    settings = (*SETTINGS, *CASES[case], "run.max_steps=3", "validation.every_steps=3", "data.num_workers=2")
    for name, corpus, source in (("raw", small_corpus, "raw"), ("cached", cached(case), "cached")):
        done = forked.train(
            stage_of(case), *settings, f"data.source={source}", models=tiny_models, corpus=corpus,
            run_dir=tmp_path / name,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    live, kept = losses(tmp_path / "raw"), losses(tmp_path / "cached")
    print(case, live, kept)
    assert kept == pytest.approx(live, rel=HALF_PRECISION)
    assert kept != live  # of half precision, not of the images
    figures = [
        {name: value for name, value in metrics(tmp_path / run)[-1].items() if name.startswith("validation")}
        for run in ("raw", "cached")
    ]
    assert len(figures[0]) >= 2
    assert figures[1] == pytest.approx(figures[0], rel=HALF_PRECISION)
    assert keys(tmp_path / "cached") == keys(tmp_path / "raw")


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_the_encoders_say_and_no_encoder_is_loaded(
    case, tiny_models, small_corpus, cached
):
    def prepared(corpus: Path, source: str):
        config = configuration(
            stage_of(case), *SETTINGS, *CASES[case], f"data.source={source}",
            models=tiny_models, corpus=corpus,
        )  # fmt: skip
        folders = build.Folders.of(config)
        cache = corpora.cache_description(config, folders)
        objective = build.build_objective(config, folders, torch.device("cpu"), torch.float32, cache)
        if source == "cached":
            assert encoders_in_memory() == []
        # Whole and dropped captions, mirrored images, several shapes.
        loader = loader_of(config)
        return [
            objective.prepare(batch_at(loader, range(first, first + BATCH))) for first in range(0, 36, BATCH)
        ]

    for kept, live in zip(prepared(cached(case), "cached"), prepared(small_corpus, "raw"), strict=True):
        assert torch.equal(kept.positions_B, live.positions_B)
        close(kept.clean, live.clean)
        for name in live.conditions.keys() - {"encoder_hidden_states"}:
            close(kept.conditions[name], live.conditions[name])
        if stage_of(case) == "prior":
            mask_BL1 = live.conditions["attention_mask"][..., None]
            live_states_BLD = live.conditions["encoder_hidden_states"] * mask_BL1
            close(kept.conditions["encoder_hidden_states"], live_states_BLD)


def close(kept: torch.Tensor, live: torch.Tensor) -> None:
    """Equal but for half precision."""
    if live.dtype == torch.bool:
        assert torch.equal(kept, live)
        return
    torch.testing.assert_close(kept, live, rtol=1e-3, atol=1e-3)


def encoders_in_memory() -> list[str]:
    gc.collect()
    kinds = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "VQModel", "Encoder")
    found = (type(item).__name__ for item in gc.get_objects() if issubclass(type(item), torch.nn.Module))
    return [name for name in found if name in kinds]


def expected_keys(shards: Path, num_steps: int) -> dict[int, list[str]]:
    """Step -> sorted keys by the order of the images."""
    order = Order([read_manifest(str(shards))], seed=0)
    tables, found = Tables(order.manifest), {}
    for step in range(num_steps):
        places = order.locate(range(step * BATCH, (step + 1) * BATCH)).each()
        names = (tables[place.shard].index.keys_N[tables[place.shard].row(place)] for place in places)
        found[step + 1] = sorted(names)
    return found


def test_world_size_changes_in_the_middle_of_an_epoch(tiny_models, small_corpus, cached, tmp_path):
    """2 -> 3 -> 1 ranks on outputs; the keys are those of the images' order."""
    for world_size, num_steps in ((2, 3), (3, 5), (1, 7)):
        done = forked.train(
            "prior", *SETTINGS, "data.source=cached", f"run.max_steps={num_steps}", "data.num_workers=1",
            models=tiny_models, corpus=cached("prior"), run_dir=tmp_path, world_size=world_size,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert keys(tmp_path) == expected_keys(small_corpus / "train", 7)


def test_damaged_samples_keep_their_place_and_are_replaced_as_damaged_images_are(
    tiny_models, small_corpus, tmp_path
):
    corpus, out = tmp_path / "corpus", tmp_path / "outputs"
    shutil.copytree(small_corpus, corpus)
    num_damaged = damage_samples(corpus / "train", 0.1)
    said = precompute("prior", tiny_models, corpus / "train", out / "train")
    assert f"{num_damaged} of 96 samples are damaged" in said
    listed = [json.loads(line) for line in (out / "train" / "bad_samples.jsonl").read_text().splitlines()]
    assert len({(item["shard"], item["key"]) for item in listed}) == num_damaged
    found = {}
    for name, folder, source in (("raw", corpus, "raw"), ("cached", out, "cached")):
        run_dir = tmp_path / name
        done = forked.train(
            "prior", *SETTINGS, f"data.source={source}", "run.max_steps=9", "data.max_bad_fraction=1",
            "validation.every_steps=0", models=tiny_models, corpus=folder, run_dir=run_dir,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        bad = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
        found[name] = keys(run_dir), [(item["position"], item["replaced_by"]) for item in bad]
    assert found["cached"] == found["raw"]
    assert len(found["raw"][1]) >= num_damaged


def test_outputs_on_a_server_are_trained_on_as_those_on_a_disk(tiny_models, cached, tmp_path):
    # Records of tiny models are so short that the usual read-ahead would be hundreds of epochs.
    settings = (*SETTINGS, "data.source=cached", "run.max_steps=2", "data.group_by_length=false")
    settings += ("data.read_ahead_mib=1",)
    with http_server(cached("prior")) as server:
        for name, shards in (("disk", cached("prior") / "train"), ("server", f"{server.url}/train/")):
            done = forked.train(
                "prior", *settings, f"data.shards={shards}", "data.num_workers=1",
                models=tiny_models, corpus=cached("prior"), run_dir=tmp_path / name,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "server") == losses(tmp_path / "disk")
    assert keys(tmp_path / "server") == keys(tmp_path / "disk")


@pytest.mark.long
@pytest.mark.parametrize("case", split(CASES, "prior".__eq__))
def test_processes_that_are_killed_at_random_leave_what_one_undisturbed_process_makes(
    case, tiny_models, tmp_path
):
    """CI kills twice; KANDINSKY_DIST_CAMPAIGN=20 kills 40 times."""
    shards, num_shards = tmp_path / "corpus", 6 + 2 * NUM_KILLS
    write_corpus(shards, 0, 10 * num_shards, samples_per_shard=10, prefix="train")
    damage_samples(shards, 0.03)
    precompute(case, tiny_models, shards, tmp_path / "undisturbed")
    out, chance, alive = tmp_path / "out", random.Random(case), []
    arguments = words(case, tiny_models, shards, out)

    def start() -> None:
        folder = tmp_path / f"said-{len(os.listdir(tmp_path))}"
        folder.mkdir()
        alive.append((forked.start(folder, *arguments), folder))

    try:
        for _ in range(3):
            start()
        for number in range(NUM_KILLS):
            # Some shards more are done, and somebody is in the middle of another one.
            goal = min(num_shards - 3, (number + 1) * num_shards // (NUM_KILLS + 1))
            wait_until(lambda goal=goal: len(list(out.glob("*.idx"))) >= goal and unfinished(out), alive)
            owners = {int(path.name.split(".")[-2]) for path in out.glob(".precompute/*.tar")}
            at_work = [item for item in alive if item[0].pid in owners] or alive
            victim = chance.choice(at_work)
            victim[0].kill()
            victim[0].join()
            alive.remove(victim)
            start()
        for process, folder in alive:
            process.join(120)
            assert process.exitcode == 0, (folder / "err_0").read_text()
    finally:
        for process, _ in alive:
            process.kill()
            process.join()
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not (out / ".precompute").exists()
    assert records(out) == keys_of(shards)


def test_a_stop_is_said_and_the_same_command_continues(tiny_models, small_corpus, cached, tmp_path):
    out = tmp_path / "out"
    arguments = words("prior", tiny_models, small_corpus / "train", out)
    process = forked.start(tmp_path, *arguments)
    try:
        wait_until(lambda: unfinished(out), [(process, tmp_path)])
        os.kill(process.pid, signal.SIGTERM)
        process.join(120)
    finally:
        process.kill()
        process.join()
    said = (tmp_path / "err_0").read_text()
    assert (process.exitcode, said.count("\n")) == (STOPPED, 1), said
    assert said.startswith("stopped on request: the same command continues")
    assert not (out / MANIFEST_NAME).exists()
    assert not unfinished(out)
    precompute("prior", tiny_models, small_corpus / "train", out)
    assert contents(out) == contents(cached("prior") / "train")


def unfinished(out: Path) -> list[Path]:
    return list(out.glob(".precompute/*.tar"))


def wait_until(is_so, alive) -> None:
    while not is_so():
        # Wakes up when one of them ends, which it must not do before there is nothing left.
        ended = multiprocessing.connection.wait([process.sentinel for process, _ in alive], timeout=0.01)
        assert not ended, [(folder / "err_0").read_text() for _, folder in alive]


def contents(out: Path) -> dict[str, bytes | str]:
    """All that does not say when it was made; of the manifest, a map without an order, what it says."""
    names = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found: dict[str, bytes | str] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in names
        if path.suffix != ".idx" and path.name != MANIFEST_NAME
    }
    assert any(name.endswith(".tar") for name in found)
    return found | {MANIFEST_NAME: read_manifest(str(out)).fingerprint}


def keys_of(shards: Path) -> list[tuple[str, str]]:
    manifest = read_manifest(str(shards))
    tables = Tables(manifest)
    return [
        (manifest.tars[shard], tables[shard].index.keys_N[tables[shard].row(Place(shard, index))])
        for shard in range(len(manifest))
        for index in range(int(manifest.num_samples_S[shard]))
    ]


def records(out: Path) -> list[tuple[str, str]]:
    """Shard and key of every record, the empty ones of damaged samples included, as the tars have them."""
    found, empty = [], 0
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                assert member.name.endswith(".cached")
                empty += member.size == 0
                found.append((tar.name, member.name.removesuffix(".cached")))
    assert empty == len((out / "bad_samples.jsonl").read_text().splitlines()) > 0
    return found


def test_a_finished_folder_is_kept_and_one_of_something_else_is_refused(
    tiny_models, small_corpus, cached, tmp_path
):
    out = Path(shutil.copytree(cached("prior") / "validation", tmp_path / "out"))
    shards, before = small_corpus / "validation", contents(cached("prior") / "validation")
    assert "is already complete: kept" in precompute("prior", tiny_models, shards, out)
    assert contents(out) == before
    for arguments, said in (
        (
            words("prior", tiny_models, shards, out, "--dtype=bf16"),
            "--dtype=fp16, this command asks for bf16",
        ),
        (words("prior", tiny_models, small_corpus / "train", out), "data.shards of fingerprint="),
        (words("decoder", tiny_models, shards, out), "stage=prior, this command asks for decoder"),
        (words("prior", tiny_models, shards, shards), "holds something else"),
    ):
        assert said in one_line(forked.command(*arguments), CONFIGURATION)
    assert contents(out) == before


def test_what_is_missing_from_a_folder_is_made_again(tiny_models, small_corpus, cached, tmp_path):
    out = Path(shutil.copytree(cached("prior") / "train", tmp_path / "out"))
    before = contents(out)
    (out / MANIFEST_NAME).unlink()
    (out / "train-00001.tar.idx").unlink()
    with open(out / "train-00002.tar", "r+b") as tar:
        tar.truncate(4096)
    assert "64 samples here" in precompute("prior", tiny_models, small_corpus / "train", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("case", "settings", "said"),
    [
        ("prior", ("data.captions=[json.tags]",), "data.captions=['txt'], this run has ['json.tags']"),
        ("decoder", ("data.resolution=128",), "data.resolution=64, this run has 128"),
        (
            "decoder",
            ("data.resolution=64", "data.aspect_buckets=true"),
            "data.aspect_buckets=False, this run has",
        ),
        (
            "buckets",
            ("data.resolution=192", "data.horizontal_flip=0.5", "data.aspect_buckets=true"),
            "--flip",
        ),
    ],
)
def test_outputs_that_are_not_those_of_the_run_are_refused(
    case, settings, said, tiny_models, cached, tmp_path
):
    done = forked.train(
        stage_of(case), "data.source=cached", *settings,
        models=tiny_models, corpus=cached(case), run_dir=tmp_path / "run",
    )  # fmt: skip
    assert said in one_line(done, CONFIGURATION)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("case", "component"), [("prior", "text_encoder"), ("decoder", "image_encoder")])
def test_outputs_of_other_weights_are_refused(case, component, tiny_models, cached, tmp_path):
    models = Path(shutil.copytree(tiny_models, tmp_path / "models"))
    weights = models / "prior" / component / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = forked.train(
        stage_of(case), "data.source=cached", models=models, corpus=cached(case), run_dir=tmp_path / "run"
    )
    line = one_line(done, CONFIGURATION)
    assert f"was precomputed with {component}=weights " in line
