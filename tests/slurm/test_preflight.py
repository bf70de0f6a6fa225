"""A node that cannot take part is named before the first step, and no step is made."""

import importlib.metadata
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import Jobs

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def jobs(cluster, repository, tiny_models, small_corpus):
    return Jobs(cluster, repository, tiny_models, small_corpus)


@contextmanager
def laid_over(jobs, source, target, *options):
    """On n1 alone, `source` is seen in place of `target`."""
    jobs.cluster.on_host("n1", ["mount", "--bind", str(source), str(target)])
    try:
        if options:
            jobs.cluster.on_host("n1", ["mount", "-o", ",".join(("remount", "bind", *options)), str(target)])
        yield
    finally:
        jobs.cluster.on_host("n1", ["umount", str(target)])


def ended(jobs, run_dir, code):
    """What a job said that ended with this code before it trained."""
    job = jobs.submit("prior", run_dir)
    jobs.cluster.wait(job, timeout=180)
    printed = jobs.cluster.output(job)
    assert jobs.cluster.exit_code(job) == code, printed
    assert "step 1/" not in printed
    lines = [line for line in printed.splitlines() if "preflight" in line]
    assert len(lines) == 1, printed
    return lines[0]


def test_a_node_with_another_version_is_named(jobs, tmp_path):
    package = importlib.metadata.distribution("webdataset")
    metadata = next(path for path in package.files or () if path.name == "METADATA").locate()
    other = tmp_path / "METADATA"
    other.write_text(Path(metadata).read_text().replace(f"Version: {package.version}", "Version: 0.0.1"))
    with laid_over(jobs, other, metadata):
        said = ended(jobs, tmp_path / "run", 78)
    assert f"n1: webdataset is 0.0.1, on the other nodes {package.version}; install the same one" in said


def test_a_node_that_cannot_write_the_run_folder_is_named(jobs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with laid_over(jobs, folder, folder, "ro"):
        said = ended(jobs, folder, 78)
    assert f"n1: run.dir={folder} cannot be written: Read-only file system" in said


def test_a_node_that_misses_a_shard_is_named(jobs, small_corpus, tmp_path):
    """The second node looks at every second shard; here its mount of the corpus has lost that one."""
    shard = sorted((small_corpus / "train").glob("*.tar"))[1]
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with laid_over(jobs, empty, shard):
        said = ended(jobs, tmp_path / "run", 65)
    assert f"n1: {shard} has 0 bytes" in said


def test_a_node_that_cannot_start_at_all_is_named(jobs, tiny_models, tmp_path):
    """Its file system lacks the models; the others' do not."""
    empty = tmp_path / "nothing"
    empty.mkdir()
    with laid_over(jobs, empty, tiny_models / "prior"):
        said = ended(jobs, tmp_path / "run", 78)
    assert "n1: model.prior=" in said


def test_nodes_that_reach_each_other_too_slowly_are_named(jobs, tmp_path):
    """Of two nodes both are slow with all neighbours that they have."""
    job = jobs.submit("prior", tmp_path, environment={"KANDINSKY_MIN_GB_S": "1000"})
    jobs.cluster.wait(job, timeout=180)
    printed = jobs.cluster.output(job)
    assert jobs.cluster.exit_code(job) == 78, printed
    assert "step 1/" not in printed
    lines = [line for line in printed.splitlines() if "preflight" in line]
    assert [line.split(": ")[2] for line in lines] == ["n0", "n1"], printed
    assert all("KANDINSKY_MIN_GB_S=1000; repair its link" in line for line in lines)


def test_a_network_that_is_fast_enough_is_measured_and_the_run_begins(jobs, tmp_path):
    job = jobs.submit("prior", tmp_path, "run.max_steps=1", environment={"KANDINSKY_MIN_GB_S": "1e-6"})
    assert re.search(r"preflight: 2 nodes fit, 0 GPUs, all-reduce at \S+ GB/s", jobs.completed(job))
