"""What is trained on, from the command line: never lost, never repeated, whatever dies, breaks or changes."""

import io
import json
import os
import pickle
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
from helpers.command import keys, losses, train_arguments
from helpers.forked import started, train
from helpers.pictures import damage_samples, draw, write_corpus
from helpers.running import wait_until, workers_of

from kandinsky_dist.checkpoint.layout import checkpoints_of
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.tables import Tables

pytestmark = pytest.mark.dist

DATA, CONFIGURATION = 65, 78
BATCH = 12
NUM_STEPS = int(os.environ.get("KANDINSKY_DIST_CAMPAIGN", "14"))
NUM_SAMPLES = 10 * NUM_STEPS
"""A little more than an epoch is trained on."""
SETTINGS = (f"data.global_batch_size={BATCH}", "data.micro_batch_size=1")


@pytest.fixture
def corpus(small_corpus: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_corpus, tmp_path / "corpus"))


def expected_keys(shards: Path, num_steps: int, **order) -> dict[int, list[str]]:
    """Step -> sorted keys, straight from the order's rule."""
    corpus = Order([read_manifest(str(shards))], seed=0, **order)
    tables, found = Tables(corpus.manifest), {}
    for step in range(num_steps):
        places = corpus.locate(range(step * BATCH, (step + 1) * BATCH)).each()
        found[step + 1] = sorted(
            (table := tables[place.shard]).index.keys_N[table.row(place)] for place in places
        )
    return found


@pytest.mark.parametrize(
    ("stage", "setting", "order"),
    [("prior", "data.num_workers=1", {}), ("decoder", "data.aspect_buckets=true", {"bucket_samples": BATCH})],
)
def test_world_size_changes_in_the_middle_of_an_epoch(
    tiny_models, small_corpus, tmp_path, stage, setting, order
):
    """2 -> 4 -> 1 -> 3 ranks; an epoch is 8 steps, so each change but the last is inside one."""
    run_dir = tmp_path / "run"
    for world_size, num_steps in ((2, 3), (4, 5), (1, 7), (3, 10)):
        done = train(
            stage, *SETTINGS, setting, f"run.max_steps={num_steps}", "checkpoint.every_steps=1",
            models=tiny_models, corpus=small_corpus, run_dir=run_dir, world_size=world_size,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = keys(run_dir)
    assert found == expected_keys(small_corpus / "train", 10, **order)
    epoch = [key for step in range(1, 9) for key in found[step]]
    if not order:
        assert len(set(epoch)) == len(epoch) == 96


def test_fewer_ranks_after_a_kill_leave_no_sample_in_two_audits(tiny_models, small_corpus, tmp_path):
    """Killed in step 5, before its checkpoint; one of the two ranks makes steps 4 and 5 again alone."""
    run_dir = tmp_path / "run"
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": run_dir}
    for world_size, num_steps in ((2, 5), (1, 7)):
        words = (*SETTINGS, f"run.max_steps={num_steps}", "checkpoint.every_steps=3")
        done = train("prior", *words, **places, world_size=world_size)
        assert done.returncode == 0, done.stderr
        if world_size == 2:
            newest, older = checkpoints_of(run_dir / "checkpoints")
            assert (newest.name, older.name) == ("step_00000005", "step_00000003")
            shutil.rmtree(newest)
    assert keys(run_dir) == expected_keys(small_corpus / "train", 7)


@pytest.mark.long
def test_damaged_samples_are_replaced_alike_at_any_world_size(tiny_models, tmp_path):
    """14 steps on 140 samples by default; KANDINSKY_DIST_CAMPAIGN=500 is the whole campaign."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus / "train", 0, NUM_SAMPLES, samples_per_shard=NUM_SAMPLES // 4, prefix="train")
    num_damaged = damage_samples(corpus / "train", 0.02)
    assert num_damaged >= 2
    found = {}
    for world_size, micro in ((1, 6), (4, 3)):
        run_dir = tmp_path / f"world-{world_size}"
        done = train(
            "prior", *SETTINGS, f"data.micro_batch_size={micro}", "data.num_workers=1",
            f"run.max_steps={NUM_STEPS}", "data.max_bad_fraction=0.05",
            models=tiny_models, corpus=corpus, run_dir=run_dir, world_size=world_size, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (run_dir / "bad_samples.jsonl").read_text().splitlines()
        found[world_size] = [json.loads(line) for line in lines]
        assert len(keys(run_dir)) == NUM_STEPS
        found[world_size, "keys"] = keys(run_dir)
    assert found[1] == found[4]
    assert found[1, "keys"] == found[4, "keys"]
    # Every pass over the corpus meets each damaged sample once; replacements meet it now and then too.
    assert len(found[1]) >= num_damaged * (NUM_STEPS * BATCH // NUM_SAMPLES)
    assert len({entry["reason"] for entry in found[1]}) <= num_damaged
    used = {key for names in found[1, "keys"].values() for key in names}
    damaged = {entry["reason"].partition(":")[2].partition(":")[0] for entry in found[1]}
    assert not used & damaged


def test_too_much_damage_stops_every_rank_with_a_checkpoint(tiny_models, corpus, tmp_path):
    damage_samples(corpus / "train", 0.5)
    run_dir = tmp_path / "run"
    places = {"models": tiny_models, "corpus": corpus, "run_dir": run_dir, "world_size": 2}
    done = train("prior", *SETTINGS, "run.max_steps=20", **places)
    assert done.returncode == DATA, done.stderr
    assert "samples so far are damaged, more than data.max_bad_fraction=0.01 allows" in done.stderr
    assert "Traceback" not in done.stderr
    (checkpoint,) = checkpoints_of(run_dir / "checkpoints")
    assert newest_whole(run_dir / "checkpoints").folder == checkpoint
    before = keys(run_dir)
    done = train("prior", *SETTINGS, "run.max_steps=8", "data.max_bad_fraction=1", **places)
    assert done.returncode == 0, done.stderr
    assert {step: keys(run_dir)[step] for step in before} == before


def test_a_shard_that_is_missing_is_named_and_nothing_is_lost_when_it_is_back(tiny_models, corpus, tmp_path):
    run_dir, shard = tmp_path / "run", corpus / "train" / "train-00001.tar"
    places = {"models": tiny_models, "corpus": corpus, "run_dir": run_dir}
    undisturbed = train(
        "prior", *SETTINGS, "run.max_steps=8", **{**places, "run_dir": tmp_path / "undisturbed"}
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    done = train("prior", *SETTINGS, "run.max_steps=3", world_size=2, **places)
    assert done.returncode == 0, done.stderr
    os.rename(shard, tmp_path / "kept")
    done = train("prior", *SETTINGS, "run.max_steps=8", world_size=2, **places)
    assert done.returncode == DATA, done.stderr
    assert "shards are missing" in done.stderr
    os.rename(tmp_path / "kept", shard)
    done = train("prior", *SETTINGS, "run.max_steps=8", world_size=3, **places)
    assert done.returncode == 0, done.stderr
    assert keys(run_dir) == keys(tmp_path / "undisturbed") == expected_keys(corpus / "train", 8)


def test_a_shard_that_is_replaced_under_a_run_takes_all_ranks_to_a_checkpoint(tiny_models, corpus, tmp_path):
    run_dir, shard = tmp_path / "run", corpus / "train" / "train-00002.tar"
    good = shard.read_bytes()
    program = train_arguments(
        "prior", *SETTINGS, "run.max_steps=100000", "checkpoint.every_steps=100000", "data.num_workers=1",
        models=tiny_models, corpus=corpus, run_dir=run_dir, strategy="ddp",
    )  # fmt: skip
    with started(program, 2) as run:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= 2, run)
        other = tmp_path / "other.tar"
        other.write_bytes(good + bytes(10240))
        os.replace(other, shard)
        for worker in workers_of(run):
            worker.send_signal(signal.SIGKILL)  # its successor opens the shard anew
        code, stderr = run.wait(180), run.said()
    assert code != 0
    assert "train-00002.tar has" in stderr
    assert "its manifest says" in stderr
    done_steps = newest_whole(run_dir / "checkpoints").folder
    assert done_steps is not None
    shard.write_bytes(good)
    num_steps = int(done_steps.name.removeprefix("step_")) + 3
    done = train(
        "prior", *SETTINGS, f"run.max_steps={num_steps}", models=tiny_models, corpus=corpus, run_dir=run_dir
    )
    assert done.returncode == 0, done.stderr
    found = keys(run_dir)
    expected = expected_keys(corpus / "train", num_steps)
    assert {step: found[step] for step in expected} == expected


def test_a_mixture_trains_and_resumes(tiny_models, small_corpus, tmp_path):
    mixture = f"data.mixture=[{small_corpus / 'train'}=3,{small_corpus / 'validation'}=1]"
    runs = {}
    for name, stops in (("whole", [6]), ("parts", [2, 6])):
        for number, num_steps in enumerate(stops):
            done = train(
                "prior", *SETTINGS, mixture, "data.shards=null", f"run.max_steps={num_steps}",
                models=tiny_models, corpus=small_corpus, run_dir=tmp_path / name, world_size=1 + number,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        runs[name] = keys(tmp_path / name)
    assert runs["whole"] == runs["parts"]
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), abs=1e-6)
    share = sum(int(key) >= 96 for names in runs["whole"].values() for key in names) / 72
    assert 0.1 < share < 0.4


def test_an_endless_stream_says_so_and_is_not_resumed_by_pretence(tiny_models, small_corpus, tmp_path):
    run_dir = tmp_path / "run"
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": run_dir}
    stream = (*SETTINGS, "data.source=stream")
    done = train("prior", *stream, "run.max_steps=2", world_size=2, **places)
    assert done.returncode == 0, done.stderr
    assert "cannot continue at the same sample" in done.stderr
    assert all(len(names) == BATCH for names in keys(run_dir).values())
    done = train("prior", *stream, "run.max_steps=4", **places)
    assert done.returncode == CONFIGURATION
    assert "data.shards is an endless stream" in done.stderr
    done = train("prior", *stream, "run.max_steps=4", "run.allow_change=data.shards", **places)
    assert done.returncode == 0, done.stderr


def test_shell_commands_are_run_only_where_that_is_allowed(tiny_models, small_corpus, tmp_path):
    touched = tmp_path / "touched"
    shards = f"data.shards=pipe:touch {touched}; cat {small_corpus / 'train' / 'train-00000.tar'}"
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path / "run"}
    for settings, words in (
        ([], "read it with data.source=stream"),
        (["data.source=stream"], "allow it with data.allow_pipe=true"),
    ):
        done = train("prior", *SETTINGS, shards, *settings, **places)
        assert done.returncode == CONFIGURATION
        assert words in done.stderr
        assert not touched.exists()
    done = train("prior", *SETTINGS, shards, "data.source=stream", "data.allow_pipe=true", **places)
    assert done.returncode == 0, done.stderr
    assert touched.exists()


def test_pickled_members_are_never_loaded(tiny_models, tmp_path):
    """A member that runs a program when it is unpickled lies beside each image; nobody unpickles it."""
    touched = tmp_path / "touched"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {touched}",)

    train_folder = tmp_path / "corpus" / "train"
    train_folder.mkdir(parents=True)
    with tarfile.open(train_folder / "a.tar", "w") as archive:
        for number in range(16):
            image, caption = draw(number)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "txt": caption.encode()}
            members |= {
                name: pickle.dumps(Hostile()) for name in ("pyd", "pickle", "pth", "pkl", "pt", "npy")
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"../../{number}.{extension}")  # nor do names become paths
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    index_shards(str(train_folder), progress=False)
    for source in ("raw", "stream"):
        done = train(
            "prior", *SETTINGS, f"data.source={source}",
            models=tiny_models, corpus=tmp_path / "corpus", run_dir=tmp_path / source,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not touched.exists()
    assert not list(tmp_path.rglob("*.pyd"))
    assert not (tmp_path / "0.png").exists()
