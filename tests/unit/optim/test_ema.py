"""Averages are diffusers' own, do not depend on how weights are cut, and know nothing of skipped steps."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_dist.optim import ema as module
from kandinsky_dist.optim.ema import Ema, decays_among, kind_of

CPU = torch.device("cpu")
TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def bits(tensors):
    return [tensor.clone().view(torch.int32).tolist() for tensor in tensors]


def averaged(decays, trajectory, masters=None):
    """Averages after masters took the values of a trajectory, each a flat tensor."""
    masters = [trajectory[0].clone()] if masters is None else masters
    ema = Ema(decays, masters, CPU)
    for values in trajectory[1:]:
        for master, part in zip(masters, values.split([item.numel() for item in masters]), strict=True):
            master.copy_(part)
        ema.update(TAKEN)
    return ema


@pytest.fixture(scope="module")
def trajectory():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(60, 37, generator=generator).cumsum(0))


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.8, 0.999])
def test_an_average_is_that_of_diffusers_warm_up_included(decay, trajectory):
    parameter = torch.nn.Parameter(trajectory[0].clone())
    theirs = EMAModel([parameter], decay=decay)
    ema = Ema([decay], [parameter.detach()], CPU)
    for values in trajectory[1:]:
        parameter.data.copy_(values)
        theirs.step([parameter])
        ema.update(TAKEN)
        (mine,) = ema.tensors()[kind_of(decay)]
        torch.testing.assert_close(mine, theirs.shadow_params[0], rtol=1e-5, atol=1e-6)
    assert ema.num_updates() == {kind_of(decay): theirs.optimization_step}


def test_several_decays_at_once_are_each_that_of_one_alone(trajectory):
    together = averaged([0.999, 0.3, 0.7], trajectory).tensors()
    assert list(together) == ["ema_0.999", "ema_0.3", "ema_0.7"]
    for decay in (0.999, 0.3, 0.7):
        alone = averaged([decay], trajectory).tensors()
        assert bits(together[kind_of(decay)]) == bits(alone[kind_of(decay)])
    assert len({str(bits(held)) for held in together.values()}) == 3
    assert decays_among([*together, "master", "exp_avg"]) == [0.3, 0.7, 0.999]


@given(lengths=st.lists(st.integers(0, 20), max_size=4), group_values=st.integers(1, 50))
def test_no_bit_depends_on_how_weights_are_cut_and_grouped(lengths, group_values, trajectory):
    cuts = [min(sum(lengths[: number + 1]), 37) for number in range(len(lengths))]
    masters = [part.clone() for part in trajectory[0].tensor_split(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GROUP_VALUES", group_values)
        cut = averaged([0.9], trajectory[:9], masters)
        assert all(
            sum(tensor.numel() for tensor in tensors) <= group_values
            for group in cut._groups[0.9]
            for tensors in group
        )
    whole = averaged([0.9], trajectory[:9])
    assert bits([torch.cat(cut.tensors()["ema_0.9"])]) == bits(whole.tensors()["ema_0.9"])


def test_a_skipped_step_leaves_no_trace(trajectory):
    masters = [trajectory[0].clone(), torch.tensor([-0.0, 0.0])]
    ema, undisturbed = Ema([0.9, 0.2], masters, CPU), Ema([0.9, 0.2], masters, CPU)
    for values in trajectory[1:5]:
        before = {kind: bits(held) for kind, held in ema.tensors().items()}, ema.num_updates()
        ema.update(SKIPPED)
        assert ({kind: bits(held) for kind, held in ema.tensors().items()}, ema.num_updates()) == before
        masters[0].copy_(values)
        ema.update(TAKEN)
        undisturbed.update(TAKEN)
        assert ema.num_updates() == undisturbed.num_updates()
        for kind, held in undisturbed.tensors().items():
            assert bits(ema.tensors()[kind]) == bits(held)


def test_an_update_reads_nothing_back_from_the_device(trajectory):
    """Tensors without values: whatever asked for one would raise."""
    device = torch.device("meta")
    ema = Ema([0.9, 0.5], [torch.empty(5, device=device)], device)
    ema.update(torch.empty((), device=device))
    with pytest.raises(RuntimeError, match="meta"):
        ema.num_updates()


def test_a_loaded_average_goes_on_as_the_one_that_was_saved(trajectory):
    whole = averaged([0.9], trajectory)
    first = averaged([0.9], trajectory[:7])
    master = trajectory[6].clone()
    second = Ema([0.4, 0.9], [master], CPU)
    second.load(0.9, iter(first.tensors()["ema_0.9"]), first.num_updates()["ema_0.9"])
    for values in trajectory[7:]:
        master.copy_(values)
        second.update(TAKEN)
    assert bits(second.tensors()["ema_0.9"]) == bits(whole.tensors()["ema_0.9"])
    assert second.num_updates() == {"ema_0.4": len(trajectory) - 7, "ema_0.9": len(trajectory) - 1}


def test_masters_have_their_own_values_back_and_what_follows_them_is_told(trajectory):
    masters = [part.clone() for part in trajectory[0].split(10)]
    ema = averaged([0.9, 0.5], trajectory, masters)
    mine, (average, other) = bits(masters), (bits(held) for held in ema.tensors().values())
    published = []
    with ema.in_place_of_masters(0.9, lambda: published.append(bits(masters))):
        assert bits(masters) == average
        assert published == [average]
    assert published == [average, mine]
    assert [bits(held) for held in ([*masters], *ema.tensors().values())] == [mine, average, other]
    with pytest.raises(ZeroDivisionError), ema.in_place_of_masters(0.5, lambda: published.append(None)):
        raise ZeroDivisionError
    assert [bits(held) for held in ([*masters], *ema.tensors().values())] == [mine, average, other]
    assert published[2:] == [None], "a collective after an error may wait for ever"


def test_without_decays_there_is_nothing():
    ema = Ema([], [torch.ones(3)], CPU)
    ema.update(TAKEN)
    assert ema.tensors() == ema.num_updates() == {}
