"""`launch/gpu.sh` from end to end: its plan on the CPU, with tiny networks."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import pytest
from helpers import forked

from kandinsky_dist.bench.cases import to_markdown
from kandinsky_dist.bench.gpu.run import run
from kandinsky_dist.bench.record import Record
from kandinsky_dist.cli import main

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def script(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "launch" / "gpu.sh", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def scratch():
    """A folder with a short path: sockets below it have room for 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="gpu.") as folder:
        yield Path(folder)


class ForkedStep:
    """`subprocess.Popen` of a step, forked from this process, which has imported all it needs."""

    def __init__(
        self, command: Sequence[str], *, stdin: int, stdout: BinaryIO, stderr: int, start_new_session: bool
    ) -> None:
        assert tuple(command[:3]) == (sys.executable, "-m", "kandinsky_dist")
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        self._process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=self._run, args=(command[3:], stdout.fileno())
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid, self.returncode = self._process.pid, None

    @staticmethod
    def _run(arguments: Sequence[str], output: int) -> None:
        os.setsid()
        tempfile.tempdir = None  # TMPDIR is another one by now
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.exit(main(arguments))

    def wait(self) -> int:
        self._process.join()
        self.returncode = self._process.exitcode
        return self.returncode


def run_forked(out: Path) -> int:
    """`launch/gpu.sh` with the arguments below, after its last line has parsed them. Exit code 0."""
    tempfile.tempdir = None
    run(
        out, minutes=60, spent_seconds=0, size="tiny", device_type="cpu", stages=["prior"], start=ForkedStep
    )  # fmt: skip
    return 0


@pytest.mark.parametrize("way", ["forked", pytest.param("script", marks=pytest.mark.campaign)])
def test_every_step_leaves_its_record_and_stands_in_the_table(way, scratch, tmp_path):
    """Forked steps but for the one that itself starts `train`, which is the real command."""
    out = tmp_path / "out"
    # The minutes are a limit, far beyond what tiny networks take.
    words = ("--device", "cpu", "--size", "tiny", "--stage", "prior", "--minutes", 60)
    if way == "script":
        done = script(out, *words, TMPDIR=str(scratch))
    else:
        done = forked.call(run_forked, out, environment={"TMPDIR": str(scratch)}, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu.log").read_text()
    assert {path.name for path in out.iterdir()} == {
        "gpu.json",
        "gpu.log",
        "gpu.md",
        "memory_gpu.json",
        "train_prior.json",
    }
    assert list(scratch.iterdir()) == [], "what is large is removed"

    records = {name: Record.load(out / f"{name}.json") for name in ("gpu", "train_prior", "memory_gpu")}
    for record in records.values():
        assert record.device.startswith("CPU ")
        assert {"torch", "diffusers", "accelerate"} <= record.versions.keys()
        assert str(tmp_path) not in record.command
    baseline, ours = records["train_prior"].rows
    assert (baseline["way"], ours["settings"]) == ("incumbent", {"data.source": "cached"})
    (memory,) = records["memory_gpu"].rows
    assert memory["measured_gib"] > 0
    assert memory["estimated_gib"] > 0

    outcomes = [(row["name"], row["verdict"]) for row in records["gpu"].rows]
    assert outcomes == [
        ("networks and corpus", "passed"),
        ("pytest -m gpu", "left out"),  # tells what is missing: a CUDA device
        ("prior beside baseline", "passed"),
        ("memory of a step", "passed"),
    ]
    assert all(f"| {name} " in done.stdout for name, _ in outcomes)
    assert "missing on this machine: a CUDA device" in done.stdout
    page = (out / "gpu.md").read_text()
    assert page.endswith(done.stdout)
    assert to_markdown(out / "gpu.json") == page


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "gpu.sh: no OUT: name a folder for the results"),
        (("OUT", "MORE"), "gpu.sh: MORE: one OUT is taken, and OUT was given before"),
        (("OUT", "--minutes", "soon"), "gpu.sh: --minutes soon is no number: give minutes, such as 9"),
        (("OUT", "--minutes"), "gpu.sh: --minutes has no value"),
        (("OUT", "--wheels", "/nowhere"), "gpu.sh: --wheels /nowhere holds no .whl file"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(words, line):
    done = script(*words)
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    assert done.stderr.startswith(line)


def test_the_script_passes_its_arguments_on(tmp_path):
    """From the shell through `bench gpu` to its exit code."""
    done = script(tmp_path / "out", "--minutes", 0.3, "--device", "cpu", "--size", "tiny")
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    assert done.stderr.startswith("--minutes 0.3: 20 s are kept for start and end")
    assert not (tmp_path / "out").exists()
