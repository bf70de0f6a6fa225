"""Import of packages that only some features need."""

import importlib
from types import ModuleType

from kandinsky_dist.errors import ConfigError


def require(package: str, *, extra: str, why: str) -> ModuleType:
    """Imports `package`, or says in one line what needed it and how to install it.

    Args:
        package: importable name, for instance "deepspeed".
        extra: the extra of this project that brings it.
        why: the setting or command that asked for it, for instance "parallel.strategy=zero2".

    Raises:
        ConfigError: the package is missing.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise ConfigError(
            f"{why} needs the package {package}, which is not installed: "
            f"pip install 'kandinsky-dist[{extra}]'"
        ) from error
