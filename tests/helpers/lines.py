"""What a command that failed has said on stderr."""

import re
from subprocess import CompletedProcess


def last_line(done: CompletedProcess[str], code: int) -> str:
    """The line of a command that failed with `code`: the last that it said, after what it said on its way."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def one_line(done: CompletedProcess[str], code: int) -> str:
    """The only line of a command that failed with `code` before it began its work."""
    line = last_line(done, code)
    assert done.stderr == line + "\n", done.stderr
    return line


def matches(line: str, expected: str) -> bool:
    """Whether a line is the expected one, in which * stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("*"))), line) is not None
