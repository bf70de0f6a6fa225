"""A real Slurm cluster on this machine, for tests; it ends with the process that made it.

Every host (the head and each node) is a process tree with a network, hostname, mounts and pids of its
own, on a virtual switch at the head. Addresses exist inside these namespaces only, so clusters never meet
each other or the machine's own network. The file system is shared, hence jobs run the interpreter that
runs the tests.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Seen = TypeVar("Seen")

HEAD = "head"
SUBNET = "10.77.0"
HEAD_ADDRESS = f"{SUBNET}.254"
CPUS_PER_NODE = 8
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
"""Program -> the Debian package that brings it."""

RUNNING = ("RUNNING",)
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)

_SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

# A host enters its namespaces, says so, and waits to be told that its network card is plugged in.
_HOST = """hostname {name}; mount --bind {root}/hosts /etc/hosts
mount --bind {root}/nsswitch.conf /etc/nsswitch.conf; mount -t tmpfs shm /dev/shm; ip link set lo up
echo up; read -r _
"""
_HEAD = """ip link add switch type bridge; ip addr add {address}/24 dev switch; ip link set switch up
munged --force --key-file={root}/munge/key --socket={root}/munge/socket --pid-file={root}/munge/pid \
  --log-file={root}/munge/log --seed-file={root}/munge/seed
exec slurmctld -D -c -f {root}/slurm.conf"""
_NODE = """ip addr add {address}/24 dev eth0; ip link set eth0 up
slurmd -D -N {name} -f {root}/slurm.conf &
while true; do wait; sleep 1; done"""  # a node outlives its daemon

_CONF = """ClusterName=test
SlurmctldHost={head}({head_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName=n[0-{last}] CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


class SlurmError(RuntimeError):
    """The cluster did not do what was asked; carries what it said."""


def why_unavailable() -> str | None:
    """The reason that no cluster can be started here, or None if one can."""
    missing = {
        package for program, package in PROGRAMS.items() if not shutil.which(program, path=_SEARCH_PATH)
    }
    if missing:
        return f"a Slurm cluster needs Debian's packages {', '.join(sorted(missing))}"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, for namespaces"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    if trial.returncode:
        return f"a Slurm cluster needs namespaces: {trial.stderr.strip()}"
    return None


@dataclass(frozen=True)
class _Host:
    """A running host: the process that holds its namespaces and the first process inside them."""

    holder: subprocess.Popen[str]
    init_pid: int  # as this machine counts, not as the host does


class Cluster:
    """A running cluster of `num_nodes` nodes n0, n1, ...; a context manager.

    Args:
        num_nodes: nodes beside the head, 1 to 8.
        gpus_per_node: GPUs that Slurm believes each node has (device files that nothing can compute on).
    """

    def __init__(self, *, num_nodes: int = 2, gpus_per_node: int = 0):
        self.num_nodes = num_nodes
        self.gpus_per_node = gpus_per_node
        # Not pytest's tmp_path: munged refuses a socket below a folder that others cannot enter.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)
        self._hosts: dict[str, _Host] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            self._start_host(HEAD)
            for index in range(self.num_nodes):
                self.boot(f"n{index}")
            self.wait_nodes("idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self._hosts]:
            self.power_off(name)
        shutil.rmtree(self.root, ignore_errors=True)

    def sbatch(self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path) -> int:
        """Submits a job as a user at the head would.

        Args:
            arguments: what follows `sbatch` on the command line.
            env: variables that the submitting shell has beside PATH, HOME and LANG; jobs inherit them.
            cwd: folder that the job is submitted from.

        Returns:
            The job's id.

        Raises:
            SlurmError: sbatch refused.
        """
        # The output goes to a file of ours, so that a script's own #SBATCH --output need not be known here.
        output = f"--output={self.root}/log/job-%j.out"
        words = ["sbatch", "--parsable", "--open-mode=append", output, *arguments]
        return int(self._client(words, env=env, cwd=cwd).partition(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What the controller knows about a job: the fields of `scontrol show job`."""
        words = self._client(["scontrol", "--oneliner", "show", "job", str(job)]).split()
        fields: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key and key not in fields:
                fields[key] = value
        return fields

    def wait(self, job: int, states: Collection[str] = ENDED, *, timeout: float = 120) -> dict[str, str]:
        """Waits until the job is in one of `states`.

        Args:
            timeout: seconds until this is given up.

        Returns:
            The job's fields at that moment.

        Raises:
            SlurmError: it ended in another state, or the time is over; with the job's output.
        """
        return self._until(
            lambda: self.job(job),
            lambda fields: fields["JobState"] in states,
            lambda fields: fields["JobState"] in ENDED and fields["JobState"] not in states,
            timeout,
            lambda fields: f"job {job} was to be {'/'.join(states)}: {fields}\n{self.output(job)}",
        )

    def wait_output(self, job: int, text: str, *, timeout: float = 120) -> str:
        """Waits until the job has printed `text`; returns all that it printed.

        Raises:
            SlurmError: the job ended without printing it, or the time is over.
        """

        def look() -> tuple[bool, str]:
            has_ended = self.job(job)["JobState"] in ENDED  # before reading: what it printed last is seen
            return has_ended, self.output(job)

        _, printed = self._until(
            look,
            lambda seen: text in seen[1],
            lambda seen: seen[0] and text not in seen[1],
            timeout,
            lambda seen: f"job {job} was to print {text!r}:\n{seen[1]}",
        )
        return printed

    def output(self, job: int) -> str:
        """What the job has printed up to now, over all its restarts."""
        path = self.root / "log" / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def exit_code(self, job: int) -> int:
        """Exit status of an ended job's script, as a shell would give it (128 + n for signal n)."""
        status, _, signal_number = self.job(job)["ExitCode"].partition(":")
        return 128 + int(signal_number) if int(signal_number) else int(status)

    def cancel(self, job: int) -> None:
        """`scancel`: ends the job."""
        self._client(["scancel", str(job)])

    def signal(self, job: int, number: signal.Signals, *, batch: bool = False) -> None:
        """`scancel --signal`: to the tasks of the job's steps, or with `batch` to its batch shell alone."""
        self._client(["scancel", f"--signal={number.name[3:]}", *(["--batch"] if batch else []), str(job)])

    def run(
        self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Runs any command at the head, with `env` as in `sbatch`, and returns what it printed."""
        return self._client(arguments, env=env, cwd=cwd)

    def on_host(self, name: str, arguments: Sequence[str]) -> str:
        """Runs a command on one host, with its network and mounts, and returns what it printed."""
        return self._inside(name, arguments)

    def boot(self, name: str) -> None:
        """Starts a node that is off."""
        self._start_host(name)

    def power_off(self, name: str) -> None:
        """Ends every process of a host at once, as a power failure would."""
        host = self._hosts.pop(name)
        if host.holder.poll() is None:
            # The first process takes its whole tree with it; its parent ends when it has been buried.
            os.kill(host.init_pid, signal.SIGKILL)
        host.holder.wait()
        for stream in (host.holder.stdin, host.holder.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to a node's slurmd; what runs there goes on."""
        self._inside(name, ["pkill", "-KILL", "--exact", "slurmd"])

    def start_daemon(self, name: str) -> None:
        """Starts the slurmd of a node that is on."""
        self._inside(name, ["slurmd", "-N", name, "-f", f"{self.root}/slurm.conf"])

    def set_link(self, name: str, *, up: bool) -> None:
        """Plugs in or pulls out a node's network cable."""
        self._inside(HEAD, ["ip", "link", "set", f"to-{name}", "up" if up else "down"])

    def wait_nodes(self, state: str, *, timeout: float = 60) -> None:
        """Waits until every node is in `state` (idle, allocated, down, ...)."""

        def look() -> list[str]:
            # Until the controller listens, sinfo fails; that is not yet an answer.
            with contextlib.suppress(SlurmError):
                return self._client(
                    ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
                ).split()
            return []

        self._until(
            look,
            lambda states: states == [state] * self.num_nodes,
            lambda states: False,
            timeout,
            lambda states: f"nodes were to be {state}, are {states}\n{self.logs()}",
        )

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        parts = [
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.root / "log").glob("slurm*.log"))
        ]
        return "\n".join(parts)

    def _write_files(self) -> None:
        names = [f"n{index}" for index in range(self.num_nodes)]
        for folder in ("munge", "state", "log", "dev", *(f"spool/{name}" for name in names)):
            (self.root / folder).mkdir(parents=True)
        key = self.root / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        lines = ["127.0.0.1 localhost", f"{HEAD_ADDRESS} {HEAD}"]
        (self.root / "hosts").write_text("\n".join([*lines, *(f"{_address(n)} {n}" for n in names)]) + "\n")
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        conf = _CONF.format(
            root=self.root,
            head=HEAD,
            head_address=HEAD_ADDRESS,
            last=self.num_nodes - 1,
            cpus=CPUS_PER_NODE,
            gpus=self.gpus_per_node,
        )
        gres = ""
        if self.gpus_per_node:
            for index in range(self.gpus_per_node):
                os.mknod(self.root / f"dev/nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
            gres = f"NodeName=n[0-{self.num_nodes - 1}] Name=gpu "
            gres += f"File={self.root}/dev/nvidia[0-{self.gpus_per_node - 1}]\n"
        else:
            conf = conf.replace("GresTypes=gpu\n", "").replace(" Gres=gpu:0", "")
        (self.root / "gres.conf").write_text(gres)
        (self.root / "slurm.conf").write_text(conf)

    def _start_host(self, name: str) -> None:
        is_head = name == HEAD
        address = HEAD_ADDRESS if is_head else _address(name)
        script = (_HOST + (_HEAD if is_head else _NODE)).format(root=self.root, name=name, address=address)
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
        ]
        command += ["--kill-child", "--mount-proc", "sh", "-c", script]
        log = (self.root / "log" / f"{name}.txt").open("a")
        with log:
            holder = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={"PATH": _SEARCH_PATH, "SLURM_CONF": str(self.root / "slurm.conf")},
            )
        assert holder.stdin
        assert holder.stdout
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        if holder.stdout.readline() != "up\n" or not (init_pid := children.read_text().strip()):
            holder.kill()
            holder.wait()
            raise SlurmError(f"host {name} did not start: {Path(log.name).read_text()}")
        self._hosts[name] = _Host(holder, int(init_pid))
        if not is_head:
            cable = [
                "ip",
                "link",
                "add",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                init_pid,
            ]
            # The peer's pid is one of this machine, so the head's network is entered without its pids.
            subprocess.run(
                ["nsenter", "--target", str(self._hosts[HEAD].init_pid), "--net", *cable], check=True
            )
            self._inside(HEAD, ["ip", "link", "set", f"to-{name}", "master", "switch", "up"])
        holder.stdin.write("\n")
        holder.stdin.flush()

    def _inside(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        target = str(self._hosts[name].init_pid)
        enter = [
            "nsenter",
            "--target",
            target,
            "--net",
            "--mount",
            "--uts",
            "--pid",
            f"--wdns={cwd or self.root}",
        ]
        venv_bin = str(Path(sys.executable).parent)
        result = subprocess.run(
            [*enter, "--", *command],
            capture_output=True,
            text=True,
            env={
                "PATH": os.pathsep.join((venv_bin, _SEARCH_PATH)),
                "HOME": os.environ.get("HOME", "/root"),
                "LANG": "C.UTF-8",
                "SLURM_CONF": str(self.root / "slurm.conf"),
                **(env or {}),
            },
        )
        if result.returncode:
            raise SlurmError(f"{' '.join(command)}: {result.stderr.strip()} {result.stdout.strip()}")
        return result.stdout

    def _client(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        return self._inside(HEAD, command, env=env, cwd=cwd)

    def _until(
        self,
        look: Callable[[], Seen],
        is_reached: Callable[[Seen], bool],
        is_out_of_reach: Callable[[Seen], bool],
        timeout: float,
        describe: Callable[[Seen], str],
    ) -> Seen:
        """Looks until a fact holds; Slurm offers no notification to wait on."""
        deadline = time.monotonic() + timeout
        while True:
            seen = look()
            if is_reached(seen):
                return seen
            if is_out_of_reach(seen) or time.monotonic() > deadline:
                raise SlurmError(describe(seen))
            time.sleep(0.1)


def _address(name: str) -> str:
    return f"{SUBNET}.{int(name.removeprefix('n')) + 1}"
