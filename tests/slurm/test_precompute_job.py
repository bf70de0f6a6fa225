"""slurm/precompute.sbatch: nodes that share a corpus without a process group."""

import sys

import pytest
from helpers import forked

from kandinsky_dist.data.catalogue import read_manifest

pytestmark = pytest.mark.slurm


def test_two_nodes_make_what_one_process_makes(cluster, repository, tiny_models, small_corpus, tmp_path):
    words = [
        f"--model.prior={tiny_models / 'prior'}",
        f"--data.shards={small_corpus / 'train'}",
        "--parallel.precision=fp32",
    ]
    job = cluster.sbatch(
        [
            "--nodes=2",
            "--gpus-per-node=2",
            str(repository / "slurm" / "precompute.sbatch"),
            "prior",
            *words,
            f"--out={tmp_path / 'nodes'}",
        ],
        env={"KANDINSKY_CONFIG": "prior_tiny", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        cwd=repository,
    )
    done = forked.command("precompute", "prior", *words, f"--out={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", cluster.output(job)
    nodes, one = (read_manifest(str(tmp_path / name)) for name in ("nodes", "one"))
    assert nodes.fingerprint == one.fingerprint
    for tar in one.tars:
        assert (tmp_path / "nodes" / tar).read_bytes() == (tmp_path / "one" / tar).read_bytes()
    assert "samples here" in cluster.output(job)
