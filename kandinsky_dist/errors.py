"""Errors meant for people: one line each, with the exit code the command ends with."""


class KandinskyError(Exception):
    """An error with a remedy. Its text is one line: what was seen, the rule, what to do."""

    exit_code = 1


class ConfigError(KandinskyError):
    """A setting, path or combination that cannot work as given (exit 78)."""

    exit_code = 78


class DataError(KandinskyError):
    """Shards, captions or images that cannot be read as they should (exit 65)."""

    exit_code = 65


class CheckpointError(KandinskyError):
    """A checkpoint or export that cannot be written, read or trusted (exit 1)."""


class StoppedError(KandinskyError):
    """The run stopped on request after saving itself; the same command resumes it (exit 75)."""

    exit_code = 75
