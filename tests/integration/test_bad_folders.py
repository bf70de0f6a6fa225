# ruff: noqa: E501 - a row of a table is one line
"""Folders that are not what they should be: shards, networks, runs, checkpoints.

Each is refused in one line with the contract's exit code, and leaves nothing that the repaired command trusts.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from _pytest.mark.structures import ParameterSet
from helpers.command import keys
from helpers.forked import command, train
from helpers.lines import last_line, matches, one_line
from safetensors.torch import load_file, save_file

from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.cli import main
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.tables import Tables

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
CONFIGURATION, DATA, OTHER = 78, 65, 1


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# Shards


@pytest.fixture
def corpus(small_corpus, tmp_path) -> Path:
    """A corpus of one's own."""
    return Path(shutil.copytree(small_corpus, tmp_path / "corpus"))


def again(*case: object) -> ParameterSet:
    """A case that is in the campaign: another one of its table meets the same rule."""
    return pytest.param(*case, marks=pytest.mark.campaign)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def append(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + bytes(512))


def shorten(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 1000)


SHARDS = [
    (shutil.rmtree, "data.shards=SHARDS does not exist; give a folder of .tar shards, a glob or a list file"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "data.shards=SHARDS names no .tar shards; to make some: kandinsky-dist data pack"),
    (delete("manifest.safetensors"), "SHARDS has no manifest.safetensors; run: kandinsky-dist data index SHARDS"),
    (write("manifest.safetensors", "{"), "SHARDS/manifest.safetensors cannot be read (cut short); run: kandinsky-dist data index SHARDS"),
    (shorten("manifest.safetensors"), "SHARDS/manifest.safetensors cannot be read (*); run: kandinsky-dist data index SHARDS"),
    (delete("train-00001.tar"), "data.shards=SHARDS: 1 of 3 shards are missing, first SHARDS/train-00001.tar; copy them again, or index what is there"),
    (append("train-00001.tar"), "SHARDS/train-00001.tar has SIZE bytes, its manifest says OLD: changed or cut short; copy it again, or run: kandinsky-dist data index SHARDS"),
    (delete("train-00001.tar.idx"), "data.shards=SHARDS: 1 of 3 shards have lost their index, first SHARDS/train-00001.tar.idx; run: kandinsky-dist data index SHARDS"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), SHARDS)
def test_shards_that_are_not_whole(tiny_models, corpus, tmp_path, damage, expected):
    folder = corpus / "train"
    old_size = (folder / "train-00001.tar").stat().st_size
    damage(folder)
    done = train("prior", models=tiny_models, corpus=corpus, run_dir=tmp_path / "run")
    expected = expected.replace("SHARDS", str(folder)).replace("OLD", str(old_size))
    line = one_line(done, DATA)
    assert matches(line, expected.replace("SIZE", str(old_size + 512))), line
    assert not (tmp_path / "run").exists()


def test_shards_that_are_no_folder(tiny_models, small_corpus, tmp_path):
    (tmp_path / "shards").write_text("x")
    for shards, words in (
        (tmp_path / "shards", "is not a folder; give a folder of .tar shards, a glob or a list file"),
        (
            "s3://bucket/{000..999}.tar",
            "data index 's3://bucket/{000..999}.tar' --out FOLDER, and give FOLDER as data.shards",
        ),
    ):
        line = one_line(
            train(
                "prior",
                f"data.shards={shards}",
                models=tiny_models,
                corpus=small_corpus,
                run_dir=tmp_path / "run",
            ),
            DATA,
        )
        assert line.startswith(f"data.shards={shards}"), line
        assert line.endswith(words), line


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (None, "1 of 1 shards are damaged: SHARDS/a.tar is not a tar: the file is empty; write the shard again"),
        ({}, "shards=SHARDS: no sample with an image and a .txt in 1 shards; they are empty"),
        ({"1.png": b"x", "2.png": b"y"}, "shards=SHARDS: no sample with an image and a .txt in 1 shards; 2 samples left out (2 with no caption), first a.tar:1"),
    ],
)  # fmt: skip
def test_tars_without_samples_are_refused_until_they_have_some(
    tiny_models, small_corpus, tmp_path, members, expected
):
    folder = tmp_path / "corpus" / "train"
    folder.mkdir(parents=True)
    if members is None:
        (folder / "a.tar").touch()
    else:
        write_tar(folder / "a.tar", members)
    assert one_line(command("data", "index", folder), DATA) == expected.replace("SHARDS", str(folder))
    places = {"models": tiny_models, "corpus": tmp_path / "corpus", "run_dir": tmp_path / "run"}
    line = one_line(train("prior", **places), DATA)
    assert line == f"{folder} has no manifest.safetensors; run: kandinsky-dist data index {folder}"
    shutil.copy(small_corpus / "train" / "train-00000.tar", folder / "a.tar")
    assert command("data", "index", folder).stdout.startswith("32 samples in 1 shards")
    done = train("prior", "run.max_steps=1", **places)
    assert done.returncode == 0, done.stderr


def break_picture(folder: Path, position: int) -> str:
    """Damages the picture at a position of the training stream; what a line is to call it."""
    manifest = read_manifest(str(folder))
    (place,) = Order([manifest], seed=0).locate([position]).each()
    table = Tables(manifest)[place.shard]
    row = table.row(place)
    offset, size = table.index.members(row)["png"]
    with open(manifest.tar(place.shard), "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return manifest.name(place.shard, table.index.keys_N[row])


@pytest.mark.parametrize("num_workers", [again(0), 1])
def test_a_damaged_picture_ends_the_run_which_then_resumes(tiny_models, corpus, tmp_path, num_workers):
    whole = content(corpus / "train")
    name = break_picture(corpus / "train", 19)
    settings = (
        "run.max_steps=3",
        "checkpoint.every_steps=1",
        "data.max_bad_fraction=0",
        f"data.num_workers={num_workers}",
    )
    places = {"models": tiny_models, "corpus": corpus, "run_dir": tmp_path / "run"}
    line = last_line(train("prior", *settings, **places), DATA)
    assert matches(
        line,
        f"1 of 24 samples so far are damaged, more than data.max_bad_fraction=0.0 allows, last {name}: *",
    ), line
    assert newest_whole(tmp_path / "run" / "checkpoints").folder.name == "step_00000002"
    for path, data in whole.items():
        (corpus / "train" / path).write_bytes(data)
    done = train("prior", *settings, **places)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert {step: len(found) for step, found in keys(tmp_path / "run").items()} == {1: 8, 2: 8, 3: 8}


def test_one_rank_of_two_meets_a_damaged_picture(tiny_models, corpus, tmp_path):
    """All stop together, it is said once, and nobody prints a traceback; by default, another is trained on."""
    name = break_picture(corpus / "train", 19)  # an odd position: rank 1
    places = {"models": tiny_models, "corpus": corpus, "world_size": 2, "strategy": "ddp"}
    stopped = train("prior", "run.max_steps=50", "data.max_bad_fraction=0", **places, run_dir=tmp_path / "a")
    line = last_line(stopped, DATA)
    assert stopped.stderr.count(name) == 1, stopped.stderr
    assert "Traceback" not in stopped.stderr, stopped.stderr
    assert f"last {name}: " in line
    done = train("prior", "run.max_steps=3", **places, run_dir=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    (bad,) = (tmp_path / "b" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(bad)["position"] == 19
    assert name in bad


@pytest.mark.parametrize(
    ("settings", "code"),
    [("data.shards=/nowhere", DATA), ("model.prior=/nowhere", CONFIGURATION), ("run.resume=/nowhere", OTHER)],
)
def test_ranks_that_fail_alike_say_it_once(tiny_models, small_corpus, tmp_path, settings, code):
    done = train(
        "prior", settings, models=tiny_models, corpus=small_corpus, run_dir=tmp_path / "run", world_size=2
    )
    line = one_line(done, code).removeprefix("[rank 1] ")
    assert line.startswith(settings)


# Networks


@pytest.fixture
def models(tiny_models, tmp_path) -> Path:
    """Networks of one's own; a file that is written to is another file."""
    return Path(shutil.copytree(tiny_models, tmp_path / "models"))


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def without_weight(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / name)
        del weights[min(weights)]
        save_file(weights, folder / name, metadata={"format": "pt"})

    return damage


def as_pickle(folder: Path) -> None:
    weights = folder / "prior" / "prior" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def two_tokens(folder: Path) -> None:
    write("prior/tokenizer/vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1}')(folder)
    write("prior/tokenizer/merges.txt", "#version: 0.2\n")(folder)


def one_layer_less(folder: Path) -> None:
    path = folder / "prior" / "prior" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_layers": config["num_layers"] - 1}))


def swap(folder: Path) -> None:
    (folder / "prior").rename(folder / "x")
    (folder / "decoder").rename(folder / "prior")
    (folder / "x").rename(folder / "decoder")


PRIOR = "prior/diffusion_pytorch_model.safetensors"
DAMAGED = "(Error while deserializing header: incomplete metadata, file not fully covered): copy or download it again"
NETWORKS = [
    ("prior", lambda folder: shutil.rmtree(folder / "prior"), "model.prior=MODELS/prior is not a folder: name a diffusers pipeline folder (kandinsky-dist models init makes some) or a hub name"),
    ("prior", swap, "model.prior=MODELS/prior is a KandinskyV22Pipeline (model_index.json); model.prior needs a KandinskyV22PriorPipeline"),
    ("decoder", swap, "model.prior=MODELS/prior is a KandinskyV22Pipeline (model_index.json); model.prior needs a KandinskyV22PriorPipeline"),
    ("prior", delete("prior/model_index.json"), "model.prior=MODELS/prior has no prior/model_index.json: it is not a diffusers pipeline folder"),
    ("prior", write("prior/prior/config.json", "{"), "model.prior=MODELS/prior has an unreadable prior/config.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ("prior", one_layer_less, "MODELS/prior/prior has transformer_blocks.* in its weights and no transformer_blocks.* by its config.json: the two do not belong together"),
    ("prior", write("prior/prior/config.json", '{"num_layers": "x"}'), "MODELS/prior/prior/config.json does not describe a PriorTransformer ('str' object cannot be interpreted as an integer): copy or download it again"),
    ("prior", write("prior/text_encoder/config.json", "{}"), "MODELS/prior/text_encoder cannot be loaded as a CLIPTextModelWithProjection: the weights are not those of its config.json, or a file is damaged (*); copy or download it again"),
    ("decoder", write("decoder/movq/config.json", "{}"), "MODELS/decoder/movq cannot be loaded as a VQModel: the weights are not those of its config.json, or a file is damaged (*); copy or download it again"),
    ("prior", cut(f"prior/{PRIOR}"), f"model.prior=MODELS/prior has a damaged {PRIOR} {DAMAGED}"),
    ("prior", cut("prior/image_encoder/model.safetensors"), f"model.prior=MODELS/prior has a damaged image_encoder/model.safetensors {DAMAGED}"),
    ("prior", without_weight("prior/text_encoder/model.safetensors"), "MODELS/prior/text_encoder lacks 1 weights that its config.json asks for, first *: copy or download it again"),
    ("decoder", without_weight("decoder/movq/diffusion_pytorch_model.safetensors"), "MODELS/decoder/movq lacks 1 weights that its config.json asks for, first *: copy or download it again"),
    ("prior", as_pickle, f"model.prior=MODELS/prior has prior only as diffusion_pytorch_model.bin, a pickle, which is never read: convert it to {Path(PRIOR).name}"),
    ("prior", two_tokens, "MODELS/prior/tokenizer has 2 tokens, its text encoder 49,408 (vocab_size in text_encoder/config.json): take the tokenizer that belongs to the text encoder"),
    ("prior", delete("prior/tokenizer/vocab.json"), "MODELS/prior/tokenizer holds no vocab.json and no tokenizer.json: it is not a CLIP tokenizer"),
    ("prior", lambda folder: shutil.rmtree(folder / "prior" / "tokenizer"), "model.prior=MODELS/prior has no folder tokenizer: it is not a whole pipeline"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "damage", "expected"), NETWORKS)
def test_networks_that_cannot_be_trusted(models, small_corpus, tmp_path, stage, damage, expected):
    damage(models)
    line = last_line(
        train(stage, models=models, corpus=small_corpus, run_dir=tmp_path / "run"), CONFIGURATION
    )
    assert matches(line, expected.replace("MODELS", str(models))), line
    assert not (tmp_path / "run" / "checkpoints").exists()


# Runs and checkpoints


@pytest.fixture(scope="module")
def trained(tiny_models, small_corpus, tmp_path_factory) -> Path:
    """The run folder of a prior after two steps. Read only."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = train("prior", models=tiny_models, corpus=small_corpus, run_dir=run)
    assert done.returncode == 0, done.stderr
    return run


def another_corpus(places: dict[str, Path], scratch: Path) -> None:
    write_tar(scratch / "train" / "a.tar", {"1.png": b"x", "1.txt": b"x"})
    index_shards(str(scratch / "train"))
    places["corpus"] = scratch


def another_architecture(places: dict[str, Path], scratch: Path) -> None:
    folder = Path(shutil.copytree(places["models"], scratch / "models"))
    config = json.loads((folder / "prior" / "prior" / "config.json").read_text())
    last = f"transformer_blocks.{config['num_layers'] - 1}."
    weights = load_file(folder / "prior" / PRIOR)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(last)}
    save_file(weights, folder / "prior" / PRIOR, metadata={"format": "pt"})
    config["num_layers"] -= 1
    (folder / "prior" / "prior" / "config.json").write_text(json.dumps(config))
    places["models"] = folder


def another_text_encoder(places: dict[str, Path], scratch: Path) -> None:
    """The same shapes and files, other weights: the prior would be asked about texts it has never seen."""
    folder = Path(shutil.copytree(places["models"], scratch / "models"))
    path = folder / "prior" / "text_encoder" / "model.safetensors"
    weights = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    places["models"] = folder


@pytest.mark.parametrize(
    ("key", "new", "old", "change"),
    [
        again("run.seed", "1", "0", None),
        ("data.global_batch_size", "16", "8", None),
        again("data.caption_dropout", "0.3", "0.1", None),
        ("data.shards", "corpus *", "corpus *", another_corpus),
        ("model.prior", "weights *", "weights *", another_architecture),
        ("model.prior", "weights *", "weights *", another_text_encoder),
    ],
)
def test_a_run_folder_of_another_run(tiny_models, small_corpus, trained, tmp_path, key, new, old, change):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    places = {"models": tiny_models, "corpus": small_corpus}
    settings = ["run.max_steps=3"]
    if change is None:
        settings.append(f"{key}={new}")
    else:
        (tmp_path / "other" / "train").mkdir(parents=True)
        change(places, tmp_path / "other")
    before = content(run)
    line = one_line(train("prior", *settings, **places, run_dir=run), CONFIGURATION)
    found = line.split(f", but {run}/checkpoints/step_00000002 was trained with ")
    assert found[0].startswith(f"{key} is {new.rstrip('*')}"), line
    value, _, remedy = found[1].partition(": ")
    assert value.startswith(old.rstrip("*")), line
    assert value != found[0].removeprefix(f"{key} is ")
    assert remedy == f"use another run.dir, or allow it with --run.allow_change {key}"
    assert content(run) == before
    if change is not another_corpus:  # which has one sample, and that no picture
        done = train("prior", *settings, f"run.allow_change={key}", **places, run_dir=run)
        assert done.returncode == 0, done.stderr


def test_a_run_folder_of_the_other_stage(tiny_models, small_corpus, trained):
    before = content(trained)
    done = train("decoder", models=tiny_models, corpus=small_corpus, run_dir=trained)
    assert one_line(done, CONFIGURATION) == (
        f"stage is decoder, but {trained}/checkpoints/step_00000002 was trained with prior: use another run.dir"
    )
    assert content(trained) == before


def test_run_folders_that_cannot_be_used(tiny_models, small_corpus, trained, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus}
    (tmp_path / "file").write_text("x")
    for run, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        line = one_line(train("prior", **places, run_dir=run), CONFIGURATION)
        assert line == f"run.dir={run} cannot be written: {reason}"
    before = content(trained)
    line = one_line(train("prior", "run.resume=never", **places, run_dir=trained), CONFIGURATION)
    assert line == (
        f"run.resume=never, but {trained}/checkpoints holds checkpoints of an earlier run: choose another run.dir, "
        "or run.resume=auto to continue it"
    )
    assert content(trained) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_is_read_only(tiny_models, small_corpus, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = train("prior", models=tiny_models, corpus=small_corpus, run_dir=tmp_path / "locked" / "run")
    assert (
        one_line(done, CONFIGURATION)
        == f"run.dir={tmp_path / 'locked' / 'run'} cannot be written: Permission denied"
    )


def test_a_damaged_checkpoint_is_never_a_fresh_start(tiny_models, small_corpus, trained, tmp_path):
    places = {"models": tiny_models, "corpus": small_corpus}
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "step_00000002"
    append("rank_00000.safetensors")(checkpoint)
    size = (checkpoint / "rank_00000.safetensors").stat().st_size
    reason = f"rank_00000.safetensors has {size} bytes, {size - 512} were written"
    line = one_line(train("prior", **places, run_dir=run), OTHER)
    assert line.startswith(
        f"no checkpoint in {run}/checkpoints is whole ({checkpoint}: {reason}): restore one, "
    )
    line = one_line(train("prior", f"run.resume={checkpoint}", **places, run_dir=tmp_path / "new"), OTHER)
    assert line == f"run.resume={checkpoint} is not a whole checkpoint: {reason}"
    line = one_line(train("prior", f"run.resume={tmp_path}", **places, run_dir=tmp_path / "new"), OTHER)
    assert line == f"run.resume={tmp_path}: no whole checkpoint there"
    assert not (tmp_path / "new").exists()
    assert (
        one_line(command("checkpoint", "verify", run), OTHER) == f"1 of 1 checkpoints in {run} are not whole"
    )
    assert one_line(command("export", run, tmp_path / "out"), OTHER).startswith(
        f"no checkpoint in {run}/checkpoints"
    )
    assert not (tmp_path / "out").exists()


DS_FILES = [
    ("{", "not readable as JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ("[]", "must be an object of settings, is a list"),
    ('{"train_batch_size": 3}', "sets train_batch_size=3, the run has 8 (data.global_batch_size): make them agree or remove it"),
    ('{"zero_optimization": {"stage": 1}}', "sets zero_optimization.stage=1, the run has 2 (parallel.strategy=zero2): make them agree or remove it"),
    ('{"zero_optimization": 2}', "sets zero_optimization=2, which must be an object of settings"),
    ('{"optimizer": {}}', "sets optimizer, which optim.* owns: remove it from the file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), DS_FILES)
def test_a_deepspeed_file_that_contradicts_the_run(tiny_models, small_corpus, tmp_path, text, expected):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(text)
    done = train(
        "prior",
        f"parallel.ds_config={tmp_path / 'ds.json'}",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
        strategy="zero2",
    )
    line = one_line(done, CONFIGURATION)
    assert line.startswith(f"parallel.ds_config={tmp_path / 'ds.json'}"), line
    assert line.endswith(expected), line


def test_commands_on_folders_that_are_not_theirs(tiny_models, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("x")
    picture = ["generate", "--decoder", tiny_models / "decoder", "--prompt", "x", "--size", "64"]
    prior = ["--prior", tiny_models / "prior"]
    for arguments, code, expected in (
        (["export", tmp_path / "nowhere", tmp_path / "out"], OTHER, "TMP/nowhere is no folder: give a run folder or one of its checkpoints"),
        (["export", tmp_path, tmp_path / "out"], OTHER, "TMP has no whole checkpoint yet: train until checkpoint.every_steps or to the end"),
        (["export", trained, tmp_path / "full"], CONFIGURATION, "TMP/full exists and is not empty: name a new folder or remove it"),
        (["export", trained, tmp_path / "file" / "out"], CONFIGURATION, "TMP/file/out cannot be written: Not a directory; name another folder"),
        (["checkpoint", "list", tmp_path], OTHER, "TMP has no checkpoints"),
        (["checkpoint", "verify", tmp_path / "nowhere"], OTHER, "TMP/nowhere has no checkpoints"),
        (["models", "init", tmp_path / "full"], CONFIGURATION, "TMP/full exists and was not written by this command: name a new or empty folder"),
        (["data", "pack", tmp_path / "nowhere", tmp_path / "out"], CONFIGURATION, "TMP/nowhere is not a folder; give one with metadata.jsonl, metadata.csv or images*"),
        (["data", "pack", tmp_path, tmp_path / "out"], DATA, "TMP: no image with a caption; it has no image files"),
        (["data", "pack", tmp_path, tmp_path / "full"], CONFIGURATION, "TMP/full exists and was not made by this very command; remove it or choose another folder"),
        (["data", "demo", tmp_path / "out", "--image-size", "0"], CONFIGURATION, "image_size=0 must be at least 1 and max_samples=None at least 2"),
        ([*picture, "--prior", trained, "--output", tmp_path / "x.png"], CONFIGURATION, f"prior={trained} has no {trained.name}/model_index.json: it is not a diffusers pipeline folder"),
        ([*picture, *prior, "--num-prior-steps", "1"], CONFIGURATION, "num_prior_steps=1 must be 2 or more"),
        ([*picture, *prior, "--device", "gpu"], CONFIGURATION, "device=gpu cannot be used (*): use cpu or cuda"),
        ([*picture, *prior, "--output", tmp_path / "full"], CONFIGURATION, "TMP/full is a folder: name a file for the image"),
        ([*picture, *prior, "--output", tmp_path / "file" / "x.png"], OTHER, "TMP/file: File exists"),
    ):  # fmt: skip
        capsys.readouterr()
        found = main([str(argument) for argument in arguments])
        line = one_line(CompletedProcess(arguments, found, *capsys.readouterr()), code)
        assert matches(line, expected.replace("TMP", str(tmp_path))), (arguments, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["keep"]
    done = command("export", trained, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()
