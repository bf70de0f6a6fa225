"""Rank and world size from whatever launcher started this process: torchrun, srun, accelerate or none."""

from collections.abc import Mapping
from dataclasses import dataclass

from kandinsky_dist.errors import ConfigError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@dataclass(frozen=True)
class Ranks:
    """This process's place: `local_rank` counts on its node, the others over all nodes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """Reads the launcher's variables; without a launcher there is one rank.

    srun's variables count only in a job step that was told where rank 0 listens: an interactive shell
    inside an allocation has them too.

    Raises:
        ConfigError: they are no whole numbers or contradict each other.
    """
    if all(name in environ for name in _TORCHRUN):
        names = _TORCHRUN
    elif all(name in environ for name in (*_SRUN, "SLURM_STEP_ID", "MASTER_ADDR")):
        names = _SRUN
    else:
        _refuse_half_a_launch(environ)
        return Ranks()
    try:
        ranks = Ranks(*(int(environ[name]) for name in names))
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)} must be whole numbers: {error}") from error
    if not 0 <= ranks.local_rank <= ranks.rank < ranks.world_size:
        raise ConfigError(
            f"{names[0]}={ranks.rank}, {names[1]}={ranks.local_rank}, {names[2]}={ranks.world_size} "
            "contradict each other: start through torchrun, srun or accelerate"
        )
    if ranks.world_size > 1 and "MASTER_ADDR" not in environ:
        raise ConfigError(
            f"{names[2]}={ranks.world_size} but MASTER_ADDR is not set: start with torchrun or set it"
        )
    return ranks


def _refuse_half_a_launch(environ: Mapping[str, str]) -> None:
    """Several processes that each took themselves for the only one would write into one run folder."""
    if environ.get("WORLD_SIZE", "1") != "1":
        missing = ", ".join(name for name in _TORCHRUN if name not in environ)
        raise ConfigError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} but {missing} is not set: start through torchrun, srun or "
            "accelerate, or unset WORLD_SIZE"
        )
