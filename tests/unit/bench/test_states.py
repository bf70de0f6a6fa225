"""Every storage counts once, in its class, whoever looks at it and however often."""

import gc
from types import SimpleNamespace

import pytest
import torch

from kandinsky_dist.bench.states import allocated_bytes, forget_the_past, take_snapshot

CPU = torch.device("cpu")
NUM_PARAMETERS = 64 * 32 + 32


@pytest.fixture(autouse=True, scope="module")
def thawed():
    """`forget_the_past` freezes the whole process's objects; the other tests want theirs collected."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as after collection


@pytest.fixture
def trained():
    """A layer and its AdamW, gradients alive, after one step has made the moments."""
    forget_the_past()
    model = torch.nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def num_bytes(trained) -> dict[str, int]:
    snapshot = take_snapshot(*trained, CPU)
    return {name: snapshot.num_bytes(name) for name in snapshot.by_class}


def test_counts_a_replicated_layer_exactly(trained):
    counted = num_bytes(trained)
    steps = 2 * 4  # AdamW's step count, a scalar a parameter
    assert counted["weights"] == 4 * NUM_PARAMETERS
    assert counted["gradients"] == 4 * NUM_PARAMETERS
    assert counted["moments"] == 8 * NUM_PARAMETERS + steps
    assert counted["masters"] == counted["buckets"] == 0


def test_a_stray_tensor_is_other_until_it_dies(trained):
    before = num_bytes(trained)["other"]
    stray = torch.ones(1000)
    assert num_bytes(trained)["other"] == before + 4000
    del stray
    assert num_bytes(trained)["other"] == before


def test_a_view_costs_what_its_whole_storage_costs(trained):
    before = num_bytes(trained)["other"]
    view = torch.ones(1000)[:1]
    views = [view, view.view(1, 1), view.detach()]
    assert num_bytes(trained)["other"] == before + 4000, views


def test_a_replicated_optimizer_state_is_seen(trained):
    model, optimizer = trained
    before = num_bytes(trained)["moments"]
    optimizer.state[model.weight]["whole"] = torch.ones(4 * NUM_PARAMETERS)
    assert num_bytes(trained)["moments"] == before + 16 * NUM_PARAMETERS


def test_gradients_in_an_engines_own_buffers_are_gradients_and_its_buckets_are_buckets(trained):
    model, _ = trained

    bucket = SimpleNamespace(buffer=[torch.ones(10), torch.ones(10)])
    wrapper = SimpleNamespace(
        averaged_gradients={0: [torch.ones(50), torch.ones(50)]}, ipg_buckets={torch.float32: bucket}
    )
    before = num_bytes(trained)
    model.optimizer = wrapper
    after = num_bytes(trained)
    assert after["gradients"] - before["gradients"] == 400
    assert after["buckets"] - before["buckets"] == 80


def test_what_was_there_before_is_not_looked_at(trained):
    past = torch.ones(1000)
    before = num_bytes(trained)["other"]
    forget_the_past()
    assert num_bytes(trained)["other"] <= before - 4000, past


def test_released_memory_is_gone_though_somebody_still_refers_to_it(trained):
    take_snapshot(*trained, CPU).release()
    counted = num_bytes(trained)
    assert [counted[name] for name in ("weights", "gradients", "moments")] == [0, 0, 0]


@pytest.mark.skipif(allocated_bytes(CPU) is None, reason="counts with Linux's /proc and glibc")
def test_the_process_grows_and_shrinks_by_a_tensor():
    before = allocated_bytes(CPU)
    tensor = torch.ones(16 * 2**20)
    grown = allocated_bytes(CPU) - before
    del tensor
    left = allocated_bytes(CPU) - before
    assert grown == pytest.approx(64 * 2**20, rel=0.05)
    assert left < 4 * 2**20
