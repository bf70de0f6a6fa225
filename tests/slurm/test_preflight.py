"""A node that cannot take part is named before the first step, and no step is made.

A network that is fast enough is measured in test_submit.py.
"""

import importlib.metadata
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

LATE = 500


@contextmanager
def laid_over(cluster, node, source, target, *options):
    """Show `source` in place of `target` on one node alone."""
    cluster.on_host(node, ["mount", "--bind", str(source), str(target)])
    try:
        if options:
            cluster.on_host(node, ["mount", "-o", ",".join(("remount", "bind", *options)), str(target)])
        yield
    finally:
        cluster.on_host(node, ["umount", str(target)])


@dataclass(frozen=True)
class Refused:
    """A job that preflight refuses: its exit status, and what it must say of which nodes."""

    job: int
    exit_status: int
    said: tuple[str, ...]


@pytest.fixture(scope="module")
def refused(jobs, tiny_models, small_corpus, tmp_path_factory):
    """Submit all jobs of this module together, on nodes whose faults no other of them sees."""
    cluster, tmp_path = jobs.cluster, tmp_path_factory.mktemp("refused")

    # n1: another version of a package, a run folder that cannot be written, and no models.
    package = importlib.metadata.distribution("webdataset")
    metadata = Path(next(path for path in package.files or () if path.name == "METADATA").locate())
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace(f"Version: {package.version}", "Version: 0.0.1"))
    read_only, nothing = tmp_path / "read only", tmp_path / "nothing"
    read_only.mkdir()
    nothing.mkdir()

    # n3: the second node looks at every second shard; here its mount of the corpus has lost that one. The
    # corpus is a copy, because n3 is in another job of this module too.
    corpus = tmp_path / "corpus"
    shutil.copytree(small_corpus / "train", corpus)
    shard = sorted(corpus.glob("*.tar"))[1]
    empty = tmp_path / "empty"
    empty.write_bytes(b"")

    with ExitStack() as overlays:
        for overlay in (
            laid_over(cluster, "n1", other, metadata),
            laid_over(cluster, "n1", read_only, read_only, "ro"),
            laid_over(cluster, "n1", nothing, tiny_models / "prior"),
            laid_over(cluster, "n3", empty, shard),
        ):
            overlays.enter_context(overlay)
        yield {
            "node": Refused(
                jobs.submit("prior", read_only, options=("--nodelist=n[0-1]",)),
                78,
                (
                    f"n1: run.dir={read_only} cannot be written: Read-only file system",
                    f"n1: model.prior={tiny_models / 'prior'}",
                    f"n1: webdataset is 0.0.1, on the other nodes {package.version}; install the same one",
                ),
            ),
            "shard": Refused(
                jobs.submit(
                    "prior", tmp_path / "run", f"data.shards={corpus}", options=("--nodelist=n[2-3]",)
                ),
                65,
                (f"n3: {shard} has 0 bytes",),
            ),
            # Of two nodes both are slow with all neighbours that they have.
            "network": Refused(
                jobs.submit(
                    "prior",
                    tmp_path / "slow",
                    options=("--nodelist=n[2-3]",),
                    environment={"KANDINSKY_MIN_GB_S": "1000"},
                ),
                78,
                tuple(f"n{index}: exchanges " for index in (2, 3)),
            ),
        }


@pytest.mark.parametrize("case", ["node", "shard", "network"])
def test_nodes_that_cannot_take_part_are_named_and_no_step_is_made(case, refused, jobs):
    expected = refused[case]
    jobs.cluster.wait(expected.job, timeout=LATE)
    printed = jobs.cluster.output(expected.job)
    assert jobs.cluster.exit_code(expected.job) == expected.exit_status, printed
    assert "step 1/" not in printed
    assert "requeued" not in printed
    lines = [line.partition("preflight: ")[2] for line in printed.splitlines() if "preflight" in line]
    assert len(lines) == len(expected.said), printed
    for line, start in zip(lines, expected.said, strict=True):
        assert line.startswith(start), printed
    if case == "network":
        assert all("KANDINSKY_MIN_GB_S=1000; repair its link" in line for line in lines)
