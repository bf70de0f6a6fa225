"""The averages of a run's weights: continued from its checkpoint, and validated beside the weights."""

from collections.abc import Callable

from kandinsky_dist.checkpoint.layout import CheckpointReader
from kandinsky_dist.optim.ema import Ema, decays_among, kind_of
from kandinsky_dist.parallel.base import Strategy
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process


def restored(strategy: Strategy, checkpoint: CheckpointReader | None, process: Process) -> Ema:
    """The averages that `optim.ema_decay` asks for, of what this rank owns.

    One that the checkpoint does not have starts from the weights, which are already those of the checkpoint.
    """
    fragments = strategy.fragments()
    ema = Ema(strategy.config.optim.ema_decay, [item.master for item in fragments], process.device)
    if checkpoint is None:
        return ema
    saved = decays_among(checkpoint.kinds)
    for decay in ema.decays:
        kind = kind_of(decay)
        if decay in saved:
            values = (checkpoint.read(item.name, kind, item.start, item.stop) for item in fragments)
            ema.load(decay, values, checkpoint.state.run.num_averaged[kind])
        else:
            say(
                f"optim.ema_decay={decay} is new: its average starts from the weights of step "
                f"{checkpoint.state.run.step}",
                process,
            )
    for decay in saved:
        if decay not in ema.decays:
            say(f"the average with decay {decay} is dropped: optim.ema_decay does not list it", process)
    return ema


def with_average(ema: Ema, strategy: Strategy, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `evaluate` finds, and with the suffix "_ema" what it finds of the average with the largest decay.

    No rank holds the whole average: the masters that it owns trade places with it, and are published.
    Collective: call on every rank.
    """
    found = evaluate()
    if ema.decays:
        with ema.in_place_of_masters(max(ema.decays), strategy.publish):
            found |= {f"{name}_ema": value for name, value in evaluate().items()}
    return found
