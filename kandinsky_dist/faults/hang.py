"""Which rank keeps all others waiting, judged by what the ranks have said of themselves. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kandinsky_dist.faults.heartbeat import Beat

MAX_NAMED = 8
"""Ranks that a line names one by one."""


@dataclass(frozen=True)
class Hang:
    """A run that does not go on.

    Attributes:
        ranks: those that did not arrive; empty if none is behind the others.
        line: what was seen, for people.
    """

    ranks: tuple[int, ...]
    line: str


def judge(before: Mapping[int, Beat], after: Mapping[int, Beat], now: float, world_size: int) -> Hang | None:
    """Tells a hang from a slow step.

    Of ranks that wait for one another, only the last one's time counts: the others may be waiting for a
    checkpoint that it is still writing, which may take longer than a step.

    Args:
        before: beats of all ranks.
        after: the same, at least two beats later: who has not beaten meanwhile is silent. Clocks of hosts
            that differ cannot make a rank silent.
        now: seconds since 1970.
        world_size: ranks that should beat.

    Returns:
        The hang, or None while there is none, or none that can be told yet.
    """
    running = {rank: beat for rank, beat in after.items() if beat.exit_code is None}
    silent = [
        beat
        for rank, beat in running.items()
        if rank in before and (before[rank].count, before[rank].pid) == (beat.count, beat.pid)
    ]
    lost = [beat for beat in silent if beat.is_lost(now)]
    if lost:
        longest = max(now - beat.time for beat in lost)
        said = sorted({f"{beat.phase} after step {beat.step}" for beat in lost})
        return Hang(
            tuple(beat.rank for beat in lost),
            f"hang: {_names(lost)} said nothing for {longest:.0f} s; last heard of in {' and '.join(said)}",
        )
    if silent or not any(beat.is_overdue for beat in running.values()):
        return None  # whoever is silent is found lost, or beats again
    missing = tuple(rank for rank in range(world_size) if rank not in after)
    if missing:
        return Hang(missing, f"hang: rank {', '.join(map(str, missing[:MAX_NAMED]))} never said anything")
    ended = [beat for beat in after.values() if beat.exit_code is not None]
    if ended:
        why = next((f": {beat.line}" for beat in ended if beat.line), "")
        return Hang(
            tuple(beat.rank for beat in ended),
            f"hang: {_names(ended)} ended with {ended[0].exit_code} and the other {len(running)} wait for it"
            + why,
        )
    last = min(beat.moves for beat in running.values())
    behind = [beat for beat in running.values() if beat.moves == last]
    overdue = [beat for beat in behind if beat.is_overdue]
    if not overdue:
        return None
    first = overdue[0]
    where = f"in {first.phase} after step {first.step} for {first.phase_seconds:.0f} s"
    limit = f"more than its limit of {first.limit_seconds:g} s"
    if len(behind) == len(running) > 1:
        return Hang((), f"hang: all {len(behind)} ranks have been {where}, {limit}: none is behind")
    others = len(running) - len(behind)
    waiting = f"; the other {others} wait for it" if others else ""
    return Hang(tuple(beat.rank for beat in behind), f"hang: {_names(behind)} {where}, {limit}{waiting}")


def _names(beats: Iterable[Beat]) -> str:
    """Ranks with host and process, the first few of them."""
    beats = list(beats)
    named = ", ".join(f"rank {beat.rank} ({beat.host}, process {beat.pid})" for beat in beats[:MAX_NAMED])
    more = len(beats) - MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named
