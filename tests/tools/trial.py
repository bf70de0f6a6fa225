"""Run tests on an edited copy of a checkout."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.changed import PACKAGE

MARK = "MUTATION_TRIAL"
"""Variable that all processes of a trial inherit: those that left the process group are found by it."""

NO_TESTS = 5
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Finished:
    """The end of one pytest process.

    Attributes:
        code: exit code; None: ended by the time limit.
        output: stdout and stderr.
        silent_seconds: since the last output.
    """

    code: int | None
    output: str
    silent_seconds: float

    def failed(self) -> list[str]:
        """Return the tests, or files, that pytest names as failed."""
        return list(dict.fromkeys(_FAILED.findall(self.output)))


class Copy:
    """A copy of a checkout in a temporary folder: what git tracks, and what it does not ignore.

    Removed on exit, with all processes that were started in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._owner = tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True)
        self._temporary = Path(self._owner.name)
        self.folder = self._temporary / "checkout"
        self._num_writes = 0

    def __enter__(self) -> "Copy":
        words = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(["git", "-C", str(self._root), *words], capture_output=True, check=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if os.path.lexists(self._root / name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._root / name, self.folder / name, follow_symlinks=False)
        code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        environment = self._environment("")
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=self._temporary
        )
        if not found.stdout.startswith(str(self.folder)):
            raise SystemExit(f"the copy's package is not what Python imports: {found.stdout or found.stderr}")
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.cleanup()

    def write(self, path: Path, source: bytes) -> None:
        """Write a file with a new modification time, which tells Python that its cached code is stale.

        Python compares size and whole seconds only, and an edit can keep both.
        """
        path.write_bytes(source)
        self._num_writes += 1
        seconds = path.stat().st_mtime + 2 * self._num_writes
        os.utime(path, (seconds, seconds))

    def pytest(self, words: Sequence[str], limit_seconds: float) -> Finished:
        """Run pytest in the copy; at the time limit all its processes are killed."""
        identity = uuid.uuid4().hex
        log = self._temporary / "output"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--basetemp={self._temporary / 'tests'}", *words]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(identity),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        code: int | None = None
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            silent_seconds = time.time() - log.stat().st_mtime
            _kill(process, identity)
        return Finished(code, log.read_text(errors="replace"), silent_seconds)

    def _environment(self, identity: str) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: identity}


def _kill(process: subprocess.Popen[bytes], identity: str) -> None:
    """Kill a process, its group, and all processes that inherited its mark."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    mark = f"{MARK}={identity}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)
        except OSError:  # ended in the meantime, or another user's
            continue


class Trial:
    """Runner of the tests on edits of one copy, one edit after another.

    Args:
        copy: the checkout's copy.
        limit_seconds: for all tests of one edit.
        words: for pytest, behind its own.
    """

    def __init__(self, copy: Copy, *, limit_seconds: float, words: Sequence[str] = ()) -> None:
        self._copy = copy
        self._limit_seconds = limit_seconds
        self._words = list(words)
        self._passes: dict[str, bool] = {}  # test -> whether it passes without an edit

    def run(
        self, path: Path, source: bytes, edited: bytes, groups: Sequence[tuple[str, Sequence[str]]]
    ) -> dict[str, Any]:
        """Run the tests on an edited file, then restore it.

        Args:
            path: file in the copy.
            source: its content without the edit.
            edited: with it.
            groups: tier and test files of one pytest run each; a group is run if the one before passes.

        Returns:
            outcome ("caught", "hung", "survived" or "unfinished"), by (the test that failed, or the reason),
            tier (where it ended), seconds (all tests of the edit).
        """
        seconds = 0.0
        result = {
            "outcome": "survived",
            "by": "" if groups else "no test reaches it",
            "tier": "",
        }
        for tier, files in groups:
            while result["outcome"] == "survived":
                self._copy.write(path, edited)
                started = time.monotonic()
                try:
                    finished = self._pytest(
                        ["-x", "-n", "2", *self._deselected(), *self._words, *files], seconds
                    )
                finally:
                    self._copy.write(path, source)
                seconds += time.monotonic() - started
                if finished.code in (0, NO_TESTS):
                    break
                if finished.code is None:
                    result = self._out_of_time(finished, tier)
                elif by := self._confirmed(finished, files):
                    result = {"outcome": "caught", "by": by, "tier": tier}
        return {**result, "seconds": round(seconds)}

    def _pytest(self, words: Sequence[str], spent_seconds: float) -> Finished:
        return self._copy.pytest(words, max(1.0, self._limit_seconds - spent_seconds))

    def _deselected(self) -> list[str]:
        return [f"--deselect={test}" for test, passes in self._passes.items() if not passes]

    def _out_of_time(self, finished: Finished, tier: str) -> dict[str, str]:
        is_hung = finished.silent_seconds >= self._limit_seconds / 2
        by = f"time-out: no test ended for {finished.silent_seconds:.0f} s" if is_hung else "time limit"
        return {"outcome": "hung" if is_hung else "unfinished", "by": by, "tier": tier}

    def _confirmed(self, finished: Finished, files: Sequence[str]) -> str:
        """Return a failed test that passes without the edit; "" if none does: later calls leave those out."""
        failed = finished.failed()
        if not failed:  # before any test, for instance in a conftest.py
            without = self._pytest(["--collect-only", *self._words, *files], 0)
            if without.code not in (0, NO_TESTS):
                raise SystemExit(f"pytest fails without an edit:\n{without.output[-3000:]}")
            return "collection"
        for test in failed:
            if test not in self._passes:
                without = self._pytest([*self._words, test], 0)
                self._passes[test] = without.code == 0
            if self._passes[test]:
                return test
        return ""
