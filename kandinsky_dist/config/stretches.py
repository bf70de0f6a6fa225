"""Stretches of steps, as settings name them."""

from collections.abc import Sequence

from kandinsky_dist.errors import ConfigError


def stretches(parts: Sequence[str]) -> list[range]:
    """What telemetry.profile names, in order, without overlap, each as long as it can be.

    Raises:
        ConfigError: a part is no step and no first:last.
    """
    found: list[range] = []
    for first, last in sorted(map(_first_and_last, parts)):
        if found and first <= found[-1].stop:
            before = found.pop()
            first, last = before.start, max(last, before[-1])
        found.append(range(first, last + 1))
    return found


def _first_and_last(part: str) -> tuple[int, int]:
    first, colon, last = part.partition(":")
    try:
        found = int(first), int(last if colon else first)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(
            f"telemetry.profile has {part!r}; each is a step from 1 on, or first:last such as 20:24"
        )
    return found
