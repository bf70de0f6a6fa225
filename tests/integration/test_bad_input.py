# ruff: noqa: E501 - a row of a table is one line
"""What is typed wrong: one line of what was seen, the rule and the remedy, and the contract's exit code.

Settings are judged without torch, so most cases run in this process; where the process matters (launchers,
signals, pipes) it is the real command.
"""

import os
import re
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.command import train_arguments
from helpers.forked import command
from helpers.lines import matches, one_line

from kandinsky_dist.cli import main

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
CONFIGURATION, DATA, OTHER = 78, 65, 1
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command that has to fail before anything starts, and returns its line."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, code: int = CONFIGURATION) -> str:
        capsys.readouterr()
        found = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert (found, out) == (code, ""), (found, out, error)
        assert error.count("\n") == 1, error
        return error.removesuffix("\n")

    return run


SETTINGS = [
    ("--data.global_batchsize=3", "unknown key data.global_batchsize (command line); did you mean data.global_batch_size?"),
    ("--seed=3", "unknown key seed (command line); did you mean run.seed?"),
    ("--config=prior_tyny", "--config prior_tyny: neither a .yaml file nor a recipe; did you mean prior_tiny?; recipes: *"),
    ("--config=", "--config : neither a .yaml file nor a recipe*"),
    ("--config=no.yaml", "--config no.yaml: No such file or directory"),
    ("--config=decoder_tiny", "--config decoder_tiny is for stage decoder, the command trains prior"),
    ("--data.micro_batch_size=eight", "data.micro_batch_size=eight must be a whole number"),
    ("--data.micro_batch_size=2.5", "data.micro_batch_size=2.5 must be a whole number"),
    ("--optim.learning_rate=fast", "optim.learning_rate=fast must be a number"),
    ("--optim.learning_rate=nan", "optim.learning_rate=nan must be a finite number"),
    ("--optim.learning_rate=inf", "optim.learning_rate=inf must be a finite number"),
    ("--optim.learning_rate=0", "optim.learning_rate=0.0 must be above 0"),
    ("--optim.max_grad_norm=inf", "optim.max_grad_norm=inf must be a finite number"),
    ("--optim.adam_epsilon=0", "optim.adam_epsilon=0.0 must be above 0"),
    ("--optim.ema_decay=1", "optim.ema_decay=1.0 must be above 0 and below 1; [] keeps no average"),
    ("--optim.ema_decay=[0.9,nan]", "optim.ema_decay=nan must be above 0 and below 1; [] keeps no average"),
    ("--optim.ema_decay=0.9,0.90", "optim.ema_decay=[0.9, 0.9] must not list a decay twice"),
    ("--optim.ema_decay=slow", "optim.ema_decay=slow must be a number"),
    ("--objective.snr_gamma=nan", "objective.snr_gamma=nan must be a finite number"),
    ("--data.audit=maybe", "data.audit=maybe must be true or false"),
    ("--data.caption_dropout=1", "data.caption_dropout=1.0 must be in [0, 1)"),
    ("--parallel.strategy=zero4", "parallel.strategy=zero4 is not one of ddp, fsdp2, zero0, zero1, zero2, zero3; did you mean zero3?"),
    ("--telemetry.report_to=wandb", "telemetry.report_to=wandb is not one of tensorboard"),
    ("--run.dir=", "run.dir= must not be empty"),
    ("--run.max_steps=0", "run.max_steps=0 must be above 0"),
    ("--run.seed", "--run.seed needs a value: --section.key value"),
    ("--run.allow_change=run.sed", "run.allow_change lists run.sed, which is no key"),
    ("--checkpoint.keep=1", "checkpoint.keep=1 must be 2 or more: *"),
    ("--data.resolution=64", "data.resolution=64 (command line) applies to the decoder only: remove it, the prior would ignore it"),
    ("--validation.every_steps=5", "validation.every_steps=5 needs validation.shards; 0 switches validation off"),
    ("--optim.lr_warmup_steps=5", "optim.lr_warmup_steps=5 does nothing with lr_scheduler=constant: use constant_with_warmup"),
    ("--parallel.ds_config=x.json", "parallel.ds_config=x.json needs a zero strategy, parallel.strategy is ddp"),
    ("--model.lora_rank=8", "model.lora_rank=8 needs model.variant=lora"),
    ("--world-size=0", "--world-size=0 must be above 0"),
    ("--world-size=two", "kandinsky-dist check: argument --world-size: invalid int value: 'two'; see kandinsky-dist check --help"),
    ("hello", "unexpected argument 'hello': settings are written --section.key value"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "expected"), SETTINGS)
def test_a_wrong_setting(refused, setting, expected):
    line = refused("check", "prior", "--data.shards=x", setting)
    assert matches(line, expected), line


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "line"),
    [
        (100, 8, 4, "data.global_batch_size=100 must be a multiple of micro_batch_size x world_size (8 x 4 = 32); nearest: 96, 128"),
        (5, 8, 2, "data.global_batch_size=5 must be a multiple of micro_batch_size x world_size (8 x 2 = 16); nearest: 16"),
    ],
)  # fmt: skip
def test_an_impossible_batch_and_its_remedy(refused, batch, micro, world_size, line):
    settings = ["--data.shards=x", f"--data.micro_batch_size={micro}", f"--world-size={world_size}"]
    assert refused("check", "prior", *settings, f"--data.global_batch_size={batch}") == line
    for nearest in re.findall(r"\d+", line.partition("nearest: ")[2]):
        assert main(["check", "prior", *settings, f"--data.global_batch_size={nearest}"]) == 0


def test_no_shards(refused):
    assert refused("train", "prior").startswith("data.shards is not set: a folder of tar shards (")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "kandinsky-dist: the following arguments are required: COMMAND; see kandinsky-dist --help"),
        ("trian", "kandinsky-dist: argument COMMAND: invalid choice: 'trian' (*"),
        ("train", "kandinsky-dist train: the following arguments are required: stage; see *"),
        ("train unet", "kandinsky-dist train: argument stage: invalid choice: 'unet' (*"),
        ("data pack a", "kandinsky-dist data pack: the following arguments are required: out; see *"),
        ("models init x --size huge", "kandinsky-dist models init: argument --size: invalid choice: 'huge' (*"),
        ("export a b --run.seed 3", "kandinsky-dist: unrecognized arguments: --run.seed 3; see kandinsky-dist --help"),
    ],
)  # fmt: skip
def test_a_wrong_command(refused, words, expected):
    line = refused(*words.split())
    assert matches(line, expected), line


FILES = [
    (b"run:\n  dri: x\n", "unknown key run.dri (*c.yaml); did you mean run.dir?"),
    (b"runn:\n  dir: x\n", "unknown section runn (*c.yaml); did you mean run?"),
    (b"run: 3\n", "section run (*c.yaml) must hold keys, holds 3"),
    (b"- a\n", "--config *c.yaml: must be sections of keys, is a list"),
    (b"run: [1\n", "--config *c.yaml: not valid YAML: *line 1, column 6*"),
    (b"run: " + 3000 * b"[", "--config *c.yaml: not valid YAML: *"),
    (b"run: !!python/object:os.system {}\n", "--config *c.yaml: not valid YAML: *"),
    (b"run:\n  dir: \xff\xfe\n", "--config *c.yaml: not UTF-8 text (invalid start byte at byte 12)"),
    ("run:\n  seed: 3\n".encode("utf-16"), "--config *c.yaml: not UTF-8 text (*)"),
    (b"run:\n  seed: 3\n  seed: 4\n", "--config *c.yaml: not valid YAML: seed is given twice *line 3, column 3*"),
    (b"run:\n  seed: 3\nrun:\n  dir: x\n", "--config *c.yaml: not valid YAML: run is given twice *line 3, column 1*"),
    (b"optim:\n  learning_rate:\n", "optim.learning_rate=None must be a number"),
    (b"parallel:\n  precision: no\n", "parallel.precision=False is not one of auto, fp32, bf16, fp16"),
    (b"stage: decoder\n", "--config *c.yaml is for stage decoder, the command trains prior"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), FILES)
def test_a_wrong_file(refused, tmp_path, content, expected):
    (tmp_path / "c.yaml").write_bytes(content)
    line = refused("check", "prior", "--data.shards=x", "--config", tmp_path / "c.yaml")
    assert matches(line, expected), line


def test_a_folder_for_a_file(refused, tmp_path):
    (tmp_path / "c.yaml").mkdir()
    line = refused("check", "prior", "--config", tmp_path / "c.yaml")
    assert line == f"--config {tmp_path / 'c.yaml'}: Is a directory"


@pytest.mark.parametrize(
    "content", ["", "data:\n", "run:\n  # seed: 3\ndata:\n  shards: x\n", "\ufeffrun:\n  seed: 3\n"]
)
def test_what_is_empty_or_commented_out_is_no_mistake(capsys, tmp_path, content):
    (tmp_path / "c.yaml").write_text(content, "utf-8")
    assert main(["check", "prior", "--data.shards=x", "--config", str(tmp_path / "c.yaml")]) == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "*RANK=2, LOCAL_RANK=0, WORLD_SIZE=2 contradict each other: *"),
        ({"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "RANK=0, LOCAL_RANK=1, WORLD_SIZE=2 contradict each other: *"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "many"}, "RANK, LOCAL_RANK, WORLD_SIZE must be whole numbers: *"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 but MASTER_ADDR is not set: *"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK, LOCAL_RANK is not set: *"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "*WORLD_SIZE=2 but LOCAL_RANK is not set: *"),
    ],
)  # fmt: skip
def test_a_launcher_that_contradicts_itself(refused, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused("train", "prior", "--data.shards=x")
    assert matches(line, expected), line


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("parallel.strategy=zero2", "deepspeed", "deepspeed"),
        ("model.variant=lora", "peft", "lora"),
        ("parallel.attention=xformers", "xformers", "xformers"),
    ],
)
def test_a_package_that_is_not_installed(refused, monkeypatch, setting, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # as the import system sees a package that is not there
    line = refused("train", "decoder", "--data.shards=x", f"--{setting}")
    assert line == f"{setting} needs the package {package}: pip install 'kandinsky-dist[{extra}]'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for them")
def test_attention_kernels_that_need_a_gpu(refused, monkeypatch, tiny_models, small_corpus, tmp_path):
    stand_in = ModuleType("xformers")
    stand_in.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", stand_in)
    places = {"models": tiny_models, "corpus": small_corpus, "run_dir": tmp_path / "run"}
    line = refused(*train_arguments("decoder", "parallel.attention=xformers", strategy="ddp", **places))
    assert line == "parallel.attention=xformers needs a CUDA GPU and none is here; use sdpa"


def python(*arguments: object, **settings) -> subprocess.CompletedProcess[str]:
    """The real command in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "kandinsky_dist", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **settings,
    )


def test_output_that_nobody_reads_is_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as broken, open("/dev/full", "wb") as full:
        line = one_line(python("check", "prior", "--data.shards=x", stdout=broken), OTHER)
        assert line == "standard output cannot be written: Broken pipe"
        line = one_line(python("check", "prior", "--data.shards=x", stdout=full), OTHER)
        assert line == "No space left on device; make room and give the same command again"


def test_the_keyboard_interrupts_in_one_line(tmp_path):
    pipe = tmp_path / "c.yaml"
    os.mkfifo(pipe)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "kandinsky_dist", "check", "prior", "--config", pipe],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
        open(pipe, "wb"),
    ):  # opens when the command has: it is inside main and waits for more
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (OTHER, "interrupted\n")


@pytest.mark.campaign
def test_ranks_that_fail_alike_say_it_once_and_their_exit_code_comes_through(tmp_path):
    """Each rank ends with 78 before it has met the others; torchrun itself would end with 1."""
    done = launched("train", "prior", f"--run.dir={tmp_path / 'run'}", "--data.global_batchsize=3")
    line = one_line(done, CONFIGURATION).removeprefix("[rank 1] ")
    assert line == SETTINGS[0][1]
    assert not (tmp_path / "run").exists()


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks by the project's own launcher."""
    program = [
        PROJECT / "launch" / "run_ranks.py",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "kandinsky_dist",
    ]
    return subprocess.run(
        [sys.executable, *map(str, [*program, *arguments])],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_no_npm_or_no_network_for_the_demo(tmp_path):
    places = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    line = one_line(
        command("data", "demo", tmp_path / "out", environment={**places, "PATH": ""}), CONFIGURATION
    )
    assert line.startswith("npm is not on PATH, which fetches ")
    assert line.endswith("kandinsky-dist data pack SRC OUT")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        "#!/bin/sh\necho 'npm error code ECONNREFUSED' >&2\necho 'npm error A log is in x' >&2\nexit 1\n"
    )
    npm.chmod(0o755)
    places["PATH"] = f"{npm.parent}:{os.environ['PATH']}"
    line = one_line(command("data", "demo", tmp_path / "out", environment=places), CONFIGURATION)
    assert "failed (ECONNREFUSED); check the network, or make shards of your own images" in line
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "kandinsky-dist"]
    assert not (tmp_path / "out").exists()


def test_no_network_for_the_tokenizer(tiny_models, tmp_path):
    places = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_NO_INDEX": "1",
    }
    line = one_line(command("models", "init", tmp_path / "models", environment=places), CONFIGURATION)
    assert line.startswith("cannot fetch CLIP's vocabulary (")
    assert line.endswith("name a folder or hub model that has the tokenizer with --tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "kandinsky-dist"]
    (tmp_path / "empty").mkdir()
    line = one_line(
        command("models", "init", tmp_path / "models", "--tokenizer", tmp_path / "empty"), CONFIGURATION
    )
    assert (
        line
        == f"--tokenizer={tmp_path / 'empty'} holds no vocab.json and no tokenizer.json: name a CLIP tokenizer"
    )
    repaired = command(
        "models", "init", tmp_path / "models", "--tokenizer", tiny_models / "prior", environment=places
    )
    assert repaired.returncode == 0, repaired.stderr
