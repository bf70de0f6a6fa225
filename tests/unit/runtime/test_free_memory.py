"""What is left of a limit, on file systems that look as Linux's do with each version of control groups."""

import sys
from pathlib import Path

import pytest

from kandinsky_dist.runtime.memory import free_bytes

GIB = 2**30


def machine(root: Path, available: int, groups: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal:       99999999 kB\nMemAvailable:   {available // 1024} kB\n"
    (root / "proc/meminfo").write_text(lines)
    (root / "proc/self/cgroup").write_text(groups)


def v1(folder: Path, *, limit: int, usage: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    # Without "total_" the groups below are left out, which the limit counts.
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {cached}\ntotal_active_file {cached}\n"
    (folder / "memory.stat").write_text(stat)


def v2(folder: Path, *, limit: int | str, usage: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file {cached}\n")


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path):
    machine(tmp_path, 5 * GIB, "4:memory:/job\n0::/\n")
    v1(tmp_path / "sys/fs/cgroup/memory/job", limit=9223372036854771712, usage=3 * GIB)
    assert free_bytes(tmp_path) == 5 * GIB


def test_a_limit_of_version_1_counts_with_the_caches_that_the_kernel_would_drop(tmp_path):
    machine(tmp_path, 50 * GIB, "11:cpu,cpuacct:/x\n4:hugetlb,memory:/slurm/uid_0/job_7/step_0\n")
    job = tmp_path / "sys/fs/cgroup/memory/slurm/uid_0/job_7"
    v1(job / "step_0", limit=40 * GIB, usage=8 * GIB)
    assert free_bytes(tmp_path) == 32 * GIB
    v1(job, limit=10 * GIB, usage=8 * GIB, cached=GIB)
    assert free_bytes(tmp_path) == 4 * GIB


def test_a_limit_of_version_2_counts_however_far_above(tmp_path):
    machine(tmp_path, 50 * GIB, "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n")
    scope = tmp_path / "sys/fs/cgroup/system.slice/slurmstepd.scope"
    v2(scope / "job_7/step_0/user/task_0", limit="max", usage=6 * GIB)
    v2(scope / "job_7", limit=16 * GIB, usage=7 * GIB)
    assert free_bytes(tmp_path) == 9 * GIB
    v2(scope / "job_7", limit=16 * GIB, usage=17 * GIB)
    assert free_bytes(tmp_path) == 0


def test_a_container_that_sees_its_hosts_paths_has_its_own_limit(tmp_path):
    machine(tmp_path, 50 * GIB, "0::/docker/0123\n")
    v2(tmp_path / "sys/fs/cgroup", limit=2 * GIB, usage=GIB)
    assert free_bytes(tmp_path) == GIB


def test_where_nothing_is_known_there_is_room(tmp_path):
    assert free_bytes(tmp_path) == sys.maxsize


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_here_it_is_more_than_nothing_and_less_than_all():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_bytes() < total
