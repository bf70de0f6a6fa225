"""`kandinsky-dist submit` without a cluster: the file, refusals, and what is said of sbatch."""

import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_dist.cli import main

WORDS = ("--data.shards", "/data/shards", "--run.dir", "/runs/prior", "--parallel.strategy", "ddp")
SAYS_NO = 'echo "sbatch: error: invalid partition" >&2; echo "sbatch: error: really" >&2; exit 1\n'
TAKES_IT = 'cat >"$TAKEN"; echo "sbatch: be nice" >&2; echo "4711;big"\n'


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of the shell that runs the tests."""
    for name in ("KANDINSKY_CONFIG", "KANDINSKY_HOME", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Puts a program of that name on the path: what is tested is how its answers are taken."""

    def put(text: str) -> Path:
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir()
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.setenv("TAKEN", str(tmp_path / "taken"))
        return tmp_path / "taken"

    return put


def test_dry_run_prints_the_file_and_submits_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "prior", "--dry-run", "--nodes", "2", "--time", "1:00:00", *WORDS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=kandinsky-prior\n#SBATCH --nodes=2\n")
    assert "#SBATCH --time=1:00:00\n" in text
    assert "export KANDINSKY_CONFIG=prior_full\n" in text
    assert text.endswith(f"slurm/train.sh prior {' '.join(WORDS)}\n")
    assert subprocess.run(["/bin/bash", "-n"], input=text.encode()).returncode == 0


def test_precompute_keeps_its_own_options(capsys):
    words = ("--out", "/data/cache", "--flip", "--data.shards", "/data/shards")
    assert main(["submit", "precompute", "decoder", "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    assert "export KANDINSKY_COMMAND=precompute\nexport KANDINSKY_CONFIG=decoder_full\n" in text
    assert text.endswith(
        "slurm/train.sh decoder --out=/data/cache --dtype=fp16 --batch-size=32 --flip "
        "--data.shards /data/shards\n"
    )


def test_a_container_becomes_options_of_srun(capsys):
    words = ("--container", "nvcr.io#a:1", "--mount", "/runs", "--mount", "/d:/data:ro", "--srun", "mpi=none")
    assert main(["submit", "prior", "--dry-run", *words, *WORDS]) == 0
    text = capsys.readouterr().out
    assert "--container-image=nvcr.io#a:1" in text
    assert "--container-mounts=/runs,/d:/data:ro,/" in text
    assert "--mpi=none" in text


def test_a_file_is_found_wherever_the_job_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("stage: prior\n")
    assert main(["submit", "prior", "--dry-run", "--config", "my.yaml", *WORDS]) == 0
    assert f"export KANDINSKY_CONFIG={tmp_path / 'my.yaml'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "3", *WORDS), "data.global_batch_size=2048 must be a multiple"),
        (("--data.shard", "/x", *WORDS), "did you mean data.shards"),
        (("--run.dir", "/runs/prior"), "data.shards is not set"),
        ((*WORDS, "--run.dir", "runs/prior"), "run.dir=runs/prior must be an absolute path"),
        (("--nodes", "0", *WORDS), "must be 1 or more"),
        (("--job-name", "a\nb", *WORDS), "--job-name 'a\\nb' holds a line break"),
        ((*WORDS, "--model.prior", "a\nb"), "holds a line break"),
        (("--env", "HF_TOKEN=x", *WORDS), "export HF_TOKEN before you submit"),
        (("--mount", "/runs", *WORDS), "needs --container"),
        (("--container", "a", *WORDS), "add --mount /runs"),
        (("--venv", "env", *WORDS), "--venv=env must be an absolute path"),
        (("--tasks-per-node", "gpu", *WORDS), "invalid choice"),
        (WORDS, "sbatch is not on PATH"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(words, said, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "prior", *words]) == 78
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_jobs_id_and_log_are_printed(capsys, tmp_path, monkeypatch, sbatch):
    taken = sbatch(TAKES_IT)
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "prior", "--output", "logs/%x-%j.log", *WORDS]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"job 4711\nlog {tmp_path}/logs/kandinsky-prior-4711.log\n"
    assert captured.err == "sbatch: be nice\n"
    assert (tmp_path / "logs").is_dir(), "without it Slurm ends the job and can tell nobody why"
    assert taken.read_text().startswith("#!/bin/bash\n#SBATCH")


def test_sbatchs_refusal_is_passed_on_in_one_line(capsys, sbatch):
    sbatch(SAYS_NO)
    assert main(["submit", "prior", *WORDS]) == 78
    assert (
        capsys.readouterr().err
        == "sbatch refused the job: sbatch: error: invalid partition; sbatch: error: really\n"
    )


def test_packages_are_asked_of_the_environment_that_runs(capsys, monkeypatch):
    """A login node without DeepSpeed can queue a job of DeepSpeed's, in another environment."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    zero = ("submit", "prior", "--dry-run", *WORDS, "--parallel.strategy", "zero2")
    assert main([*zero, "--venv", "/another"]) == 0
    assert main([*zero, "--venv", sys.prefix]) == 78
    assert "needs the package deepspeed" in capsys.readouterr().err


def test_a_login_node_needs_no_torch():
    code = (
        "import sys; from kandinsky_dist.cli import main; "
        f"main({['submit', 'prior', '--dry-run', *WORDS]!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
