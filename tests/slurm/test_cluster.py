import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, SlurmError

pytestmark = pytest.mark.slurm


def test_nodes_are_hosts_of_their_own(cluster, tmp_path):
    script = tmp_path / "who.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'echo $(hostname) $(getent hosts n1) $SLURM_GPUS_ON_NODE'\n")
    job = cluster.sbatch(
        ["--nodelist=n[0-1]", "--ntasks-per-node=1", "--gpus-per-node=2", str(script)], cwd=tmp_path
    )
    assert cluster.wait(job, timeout=60)["JobState"] == "COMPLETED", cluster.output(job)
    assert sorted(cluster.output(job).splitlines()) == ["n0 10.77.0.2 n1 2", "n1 10.77.0.2 n1 2"]


def test_a_jobs_own_exit_status_is_seen(cluster, tmp_path):
    script = tmp_path / "fails.sh"
    script.write_text("#!/bin/bash\necho on purpose\nexit 75\n")
    job = cluster.sbatch([str(script)], cwd=tmp_path)
    with pytest.raises(SlurmError, match="on purpose"):
        cluster.wait(job, ["COMPLETED"], timeout=60)
    assert cluster.exit_code(job) == 75


def test_nothing_outlives_a_killed_test_run(slurm_available):
    code = (
        "from cluster import Cluster\n"
        "with Cluster(num_nodes=1) as cluster:\n"
        "    print(cluster.root, flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert owner.stdin
    assert owner.stdout
    root = owner.stdout.readline().strip()
    daemons = _processes_that_mention(root)
    assert len(daemons) >= 3, daemons  # munged, slurmctld, slurmd
    ends = [os.pidfd_open(pid) for pid in daemons]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    for end in ends:
        assert _has_ended(end), f"of {daemons} some run on: {_processes_that_mention(root)}"
        os.close(end)
    owner.stdin.close()
    owner.stdout.close()
    subprocess.run(["rm", "-rf", root], check=True)


def _processes_that_mention(text: str) -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in words:
            found[int(path.parent.name)] = words
    return found


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 30)[0])


def test_two_clusters_do_not_meet(cluster, tmp_path):
    """They use the same addresses, and each has a node n0."""
    count = ["sinfo", "--noheader", "--partition=main", "--format=%D"]
    with Cluster(num_nodes=1) as other:
        other.sbatch(["--hold", "--job-name=of-the-other", "--wrap=true"], cwd=tmp_path)
        assert other.run(count).strip() == "1"
        assert cluster.run(count).strip() == str(cluster.num_nodes)
        names = ["squeue", "--noheader", "--format=%j"]
        assert other.run(names).split() == ["of-the-other"]
        assert "of-the-other" not in cluster.run(names).split()
