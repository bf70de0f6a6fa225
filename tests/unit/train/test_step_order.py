"""What runs beside a step is queued before the engine may wait for the device."""

from contextlib import contextmanager

import torch

from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.train.step import train_step


class Engine:
    """Writes down what it is asked to do."""

    gathers_weights = False

    def __init__(self, calls):
        self.calls = calls

    @contextmanager
    def accumulate(self, *, is_last):
        yield

    def backward(self, loss):
        self.calls.append("backward")

    def step(self, *, learning_rate):
        self.calls.append("step")


class Constant:
    def losses(self, model, prepared):
        return prepared.clean


def test_the_next_step_is_begun_between_the_last_backward_and_the_update():
    calls = []
    one = Prepared(torch.arange(2), torch.ones(2), {})
    loss, _ = train_step(
        Engine(calls), Constant(), None, [one, one], learning_rate=1.0, beside=lambda: calls.append("beside")
    )
    assert calls == ["backward", "backward", "beside", "step"]
    assert loss == 1.0
