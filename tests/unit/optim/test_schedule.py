import inspect

import pytest
import torch
from diffusers.optimization import get_scheduler

from kandinsky_dist.optim.schedule import learning_rate

PEAK = 3e-4
SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine"]


def rates_of_diffusers(scheduler: str, num_warmup_steps: int, num_steps: int, num_taken: int) -> list[float]:
    """The rate that each optimizer step really uses when the schedule is stepped once an optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler(
        scheduler, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps
    )
    rates = []
    for _ in range(num_taken):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("num_warmup_steps", "num_steps"), [(0, 50), (1, 50), (10, 50), (50, 50), (60, 50)])
def test_rate_is_that_of_diffusers_at_the_same_optimizer_step(scheduler, num_warmup_steps, num_steps):
    expected = rates_of_diffusers(scheduler, num_warmup_steps, num_steps, num_steps)
    found = [
        learning_rate(
            step,
            peak=PEAK,
            scheduler=scheduler,
            num_warmup_steps=num_warmup_steps,
            num_steps=num_steps,
        )
        for step in range(num_steps)
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_rate_stays_at_zero_past_the_end(scheduler):
    rates = [
        learning_rate(step, peak=PEAK, scheduler=scheduler, num_warmup_steps=3, num_steps=20)
        for step in (20, 21, 30, 1000)
    ]
    assert rates == pytest.approx([0.0] * 4, abs=1e-18)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_fault_b5_rate_knows_neither_accumulation_nor_world_size(scheduler):
    """B5: the predecessor's schedule moved `world size` times a step and so was right only by coincidence.

    accelerate's wrapped scheduler takes world_size steps for each optimizer step, over a length that was
    multiplied by the accumulation. Reproduced here, it disagrees; ours has no such argument to get wrong.
    """
    num_warmup_steps, num_steps = 5, 20
    ours = [
        learning_rate(
            step, peak=PEAK, scheduler=scheduler, num_warmup_steps=num_warmup_steps, num_steps=num_steps
        )
        for step in range(num_steps)
    ]
    for world_size, num_micro in [(1, 1), (4, 4), (4, 1), (1, 4)]:
        stretched = rates_of_diffusers(
            scheduler, num_warmup_steps * num_micro, num_steps * num_micro, num_steps * world_size
        )
        is_right = stretched[::world_size] == pytest.approx(ours, rel=1e-9, abs=1e-18)
        assert is_right == (world_size == num_micro or scheduler == "constant"), (world_size, num_micro)
    assert {"world_size", "num_micro"}.isdisjoint(inspect.signature(learning_rate).parameters)
