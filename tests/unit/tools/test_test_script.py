"""launch/test.sh: what it is asked for is checked before anything is installed."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "launch" / "test.sh"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tier", "quick"], "--tier quick must be unit, process, slurm or gpu"),
        (["--tier"], "--tier  must be unit, process, slurm or gpu"),
        (["--slice", "12/12"], "--slice 12/12 must be K/N with K from 0 to N - 1"),
        (["--slice", "1"], "--slice 1 must be K/N with K from 0 to N - 1"),
        (["--changed", "no-such-commit"], "--changed no-such-commit is no commit"),
        (["--fast"], "unknown argument --fast: see launch/test.sh --help"),
    ],
)
def test_a_mistake_is_one_line_and_78(words, line):
    done = run(*words)
    assert (done.returncode, done.stdout, done.stderr) == (78, "", f"test.sh: {line}\n")


def test_help_names_every_option_and_says_how_long_each_tier_takes():
    done = run("--help")
    assert done.returncode == 0
    known = set(re.findall(r"^    (--[a-z]+)\)", SCRIPT.read_text(), re.MULTILINE))
    assert known == {"--tier", "--changed", "--all", "--slice", "--coverage"}
    assert known <= set(re.findall(r"--[a-z]+", done.stdout))
    times = done.stdout.partition("Time on 2 cores")[2]
    for tier in ("unit", "process", "slurm"):
        assert re.search(rf"{tier} [^,;.]*\d+ (s|min|h)", times), (tier, times)


def test_ci_runs_the_suite_and_then_the_slice_of_its_commit():
    text = (REPOSITORY / ".ci" / "run").read_text()
    assert text.index("\n./launch/test.sh\n") < text.index('./launch/test.sh --slice "$slice/$slices"')
    (num_slices,) = re.findall(r"^slices=(\d+)$", text, re.MULTILINE)
    assert f"--slice 3/{num_slices} " in (REPOSITORY / "CONTRIBUTING.md").read_text()
