"""Who was asked to stop is not killed on the way out; who was not is as before."""

import os
import signal

import pytest

from kandinsky_dist.faults.preempt import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_stop_the_handlers_are_as_before():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening() as stop:
        assert not stop.is_made
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("is_signalled", [True, False])
def test_after_a_stop_the_launchers_signal_is_ignored_and_a_keyboard_is_not(is_signalled):
    with StopRequest().listening() as stop:
        if is_signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            stop.make()
        assert stop.is_made
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
