"""What options of a job may be: each refusal says what was seen and what to do."""

from pathlib import Path

import pytest

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.submit import rules
from kandinsky_dist.submit.checkout import find_checkout

CODE = Path("/code")


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "aws_secret_access_key", "DB_PASSWORD", "WANDB_API_KEY", "TOKEN", "SECRET_NAME", "KEYS"],
)
def test_a_secret_is_refused_and_not_repeated(name):
    with pytest.raises(ConfigError, match=f"export {name} before") as refusal:
        rules.variable(f"{name}=hunter2")
    assert "hunter2" not in str(refusal.value)


def test_what_only_resembles_a_secret_is_taken():
    assert rules.variable("TOKENIZERS_PARALLELISM=false") == ("TOKENIZERS_PARALLELISM", "false")
    assert rules.variable("EMPTY=") == ("EMPTY", "")
    assert rules.variable("OPTIONS=a=b c") == ("OPTIONS", "a=b c")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("hunter2", "'it' is none"),
        ("A-B=1", "'A-B' is none"),
        ("1A=1", "'1A' is none"),
        ("A=1\n#SBATCH --x", "line break"),
        ("NPROC_PER_NODE=4", "decided by --gpus-per-node"),
        ("KANDINSKY_TASKS=rank", "decided by --tasks-per-node"),
    ],
)
def test_variables_that_cannot_be(assignment, said):
    with pytest.raises(ConfigError, match=said):
        rules.variable(assignment)


def test_options_are_long_ones_with_or_without_dashes():
    assert rules.option("--srun", "cpu-bind=none") == "--cpu-bind=none"
    assert rules.option("--srun", "--comment=a b") == "--comment=a b"
    assert rules.option("--sbatch", "exclusive") == "--exclusive"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-N4", "no long option"),
        ("--nodes 4", "no long option"),
        ("nodes=4", "decided by --nodes"),
        ("--array=0-3", "cannot share a run folder"),
        ("--comment=a\nb", "line break"),
        (" ", "is empty"),
    ],
)
def test_options_that_cannot_be(text, said):
    with pytest.raises(ConfigError, match=said):
        rules.option("--sbatch", text)


def test_the_checkout_is_mounted_unless_it_is_already():
    assert rules.mounts(["/data"], CODE) == ["/data", "/code"]
    assert rules.mounts(["/code"], CODE) == ["/code"]
    assert rules.mounts(["/srv:/code:ro"], CODE) == ["/srv:/code:ro"]
    assert rules.mounts(["/code:/elsewhere"], CODE) == ["/code:/elsewhere", "/code"]


@pytest.mark.parametrize("mount", ["data", "/data:here", "/a,/b", "/a:/b:ro:x", ""])
def test_mounts_that_cannot_be(mount):
    with pytest.raises(ConfigError, match="--mount"):
        rules.mounts([mount], CODE)


def test_results_outlive_a_container_only_in_a_mount():
    assert rules.is_mounted("/runs/prior", ["/runs"])
    assert rules.is_mounted("/runs/prior", ["/scratch/me:/runs:rw"])
    assert not rules.is_mounted("/runs/prior", ["/runs:/elsewhere"])
    assert not rules.is_mounted("/runs2/prior", ["/runs"])


def test_the_checkout_is_where_its_scripts_are(tmp_path):
    here = find_checkout({})
    assert (here / "slurm" / "train.sh").is_file()
    with pytest.raises(ConfigError, match=r"KANDINSKY_HOME=.* has no slurm/train.sh"):
        find_checkout({"KANDINSKY_HOME": str(tmp_path)})
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sh").touch()
    assert find_checkout({"KANDINSKY_HOME": str(tmp_path)}) == tmp_path
