"""A full disk, a real one: one line and exit code 1, and the same command continues once there is room."""

import os
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.command import losses
from helpers.forked import command, train
from helpers.lines import last_line, matches, one_line
from helpers.pictures import draw

from kandinsky_dist.checkpoint.layout import checkpoints_of
from kandinsky_dist.checkpoint.manager import newest_whole
from kandinsky_dist.models.load import pipeline_folder
from kandinsky_dist.models.tokenizer import VOCABULARY_MEMBER, VOCABULARY_PACKAGE
from kandinsky_dist.train.build import PRIOR_COMPONENTS

pytestmark = pytest.mark.integration

OTHER = 1
ROOM = "64m"

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    """Mounts a small disk as a folder of that name, or gives a mounted one another size."""
    with ExitStack() as stack:

        def run(name: str, size: str) -> Path:
            folder = tmp_path / name
            options = f"remount,size={size}" if folder.exists() else f"size={size}"
            folder.mkdir(exist_ok=True)
            try:
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True
                )
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"a small disk cannot be mounted here: {error}")
            if not options.startswith("remount"):
                stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            return folder

        yield run


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of pictures, 3 MB in all."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(25):
        image, caption = draw(number)
        image.resize((200, 200)).save(folder / f"{number}.bmp")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_data_pack(mount, pictures):
    disk = mount("disk", "1m")
    line = one_line(command("data", "pack", pictures, disk / "shards"), OTHER)
    assert line == (
        f"no space left for {disk / 'shards'} in {disk} (No space left on device); free some and retry"
    )
    assert list(disk.iterdir()) == []
    mount("disk", ROOM)
    done = command("data", "pack", pictures, disk / "shards")
    assert done.returncode == 0, done.stderr
    assert (disk / "shards" / "manifest.safetensors").is_file()


def test_models_init(mount, tiny_models):
    disk = mount("disk", "4m")
    arguments = ("models", "init", disk / "models", "--tokenizer", tiny_models / "prior")
    line = one_line(command(*arguments), OTHER)
    assert line == (
        f"{disk / 'models'} cannot be written: its disk is full or a quota is used up; nothing was kept"
    )
    assert list(disk.iterdir()) == []
    mount("disk", ROOM)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    pipeline_folder(str(disk / "models" / "prior"), "prior", PRIOR_COMPONENTS)


def test_what_is_downloaded(mount, tmp_path):
    """The cache is full: npm and pip say so in many lines of theirs, and neither leaves half a file."""
    disk = mount("cache", "100k")
    cache = disk / "kandinsky-dist"
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    # Stands for npm, which needs a network: writes until the disk is full and says what npm says.
    npm.write_text(
        "#!/bin/sh\nfor folder; do :; done\ncat /dev/zero >$folder/x.tgz && exit 0\n"
        "echo 'npm error code ENOSPC\nnpm error nospc There appears to be insufficient space' >&2\nexit 228\n"
    )
    npm.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(disk), "PATH": f"{npm.parent}:/usr/bin:/bin"}
    line = one_line(command("data", "demo", tmp_path / "demo", environment=environment), OTHER)
    assert matches(line, f"no space left for @* in {cache}; make room and retry"), line
    assert list(disk.rglob("*")) == [cache]
    environment = {
        "XDG_CACHE_HOME": str(disk),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(large_wheel(tmp_path)),
    }
    line = one_line(command("models", "init", tmp_path / "models", environment=environment), OTHER)
    assert line == f"no space left for CLIP's vocabulary in {cache}; make room and retry"
    assert list(disk.rglob("*")) == [cache]
    assert not {"demo", "models"} & {path.name for path in tmp_path.iterdir()}


def large_wheel(folder: Path) -> Path:
    """A folder with a package for pip, named as the one that has the vocabulary; 200 kB."""
    name, _, version = VOCABULARY_PACKAGE.replace("-", "_").partition("==")
    path = folder / "wheels" / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        information = f"{name}-{version}.dist-info"
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
        wheel.writestr(VOCABULARY_MEMBER, bytes(200_000))
    return path.parent


def test_a_checkpoint_that_does_not_fit(mount, tiny_models, small_corpus, tmp_path):
    """The older one stays and the next start resumes from it; the losses are those of a run that had room."""
    # Beside training the disk would be full for metrics.jsonl too, and that might be what is said.
    settings = (
        "run.max_steps=4",
        "checkpoint.every_steps=1",
        "checkpoint.keep=5",
        "checkpoint.async_save=false",
    )
    places = {"models": tiny_models, "corpus": small_corpus}
    disk = mount("disk", "20m")  # a checkpoint has 8 MB
    run = disk / "run"
    line = last_line(train("prior", *settings, **places, run_dir=run), OTHER)
    assert line.startswith("checkpoint not written: rank 0: "), line
    assert line.endswith("; the older checkpoints are untouched"), line
    kept = checkpoints_of(run / "checkpoints")
    assert kept
    assert newest_whole(run / "checkpoints").folder == kept[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(path.name for path in kept)
    mount("disk", ROOM)
    done = train("prior", *settings, **places, run_dir=run)
    assert done.returncode == 0, done.stderr
    assert f"resumed {kept[0]}" in done.stderr
    straight = train("prior", *settings, **places, run_dir=tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    assert losses(run) == losses(tmp_path / "straight")
    disk = mount("export", "1m")
    line = one_line(command("export", run, disk / "pipeline"), OTHER)
    assert line == (
        f"{disk / 'pipeline'} cannot be written: its disk is full or a quota is used up; nothing was kept"
    )
    assert list(disk.iterdir()) == []
    mount("export", ROOM)
    assert command("export", run, disk / "pipeline").returncode == 0


def test_a_checkpoint_beside_training_that_does_not_fit(mount, tiny_models, small_corpus, tmp_path):
    """Both ranks stop at a step boundary with one line, long before the next save would have told them."""
    settings = ("run.max_steps=120", "checkpoint.every_steps=40", "checkpoint.keep=5")
    places = {"models": tiny_models, "corpus": small_corpus, "world_size": 2}
    disk = mount("disk", "12m")  # a checkpoint has 8 MB
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    done = train("prior", *settings, **places, run_dir=run)
    assert done.returncode == OTHER, done.stderr
    said = [line for line in done.stderr.splitlines() if "checkpoint not written" in line]
    assert said, done.stderr
    for line in said:
        assert matches(line, "*checkpoint not written: rank *: *; the older checkpoints are untouched"), line
    assert "Traceback" not in done.stderr
    assert "saved in" not in done.stderr
    assert 80 <= len(losses(run)) < 120, "it was only told by the next save"
    assert [path.name for path in disk.iterdir()] == ["step_00000040"]
    mount("disk", ROOM)
    done = train("prior", *settings[1:], "run.max_steps=42", **places, run_dir=run)
    assert done.returncode == 0, done.stderr
    assert f"resumed {run / 'checkpoints' / 'step_00000040'}" in done.stderr


@pytest.mark.parametrize("sinks", ["[]", "[tensorboard]"])
def test_metrics_that_do_not_fit(mount, tiny_models, small_corpus, sinks):
    settings = (f"telemetry.report_to={sinks}", "run.max_steps=300", "data.audit=false")
    places = {"models": tiny_models, "corpus": small_corpus}
    disk = mount("disk", "16k")
    line = last_line(train("prior", *settings, **places, run_dir=disk / "run"), OTHER)
    assert line.startswith(f"{disk / 'run'}/"), line
    assert line.endswith(": No space left on device; make room and give the same command again"), line
    (disk / "filler").write_bytes(bytes(disk_bytes_free(disk)))
    line = one_line(train("prior", *settings, **places, run_dir=disk / "another"), OTHER)
    assert line == f"run.dir={disk / 'another'}: No space left on device; make room and retry"
    assert list((disk / "another").iterdir()) == []
    mount("disk", ROOM)
    done = train("prior", *settings[:1], "run.max_steps=2", **places, run_dir=disk / "run")
    assert done.returncode == 0, done.stderr


def disk_bytes_free(folder: Path) -> int:
    """Bytes that a file can still take."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_bsize
