"""The start of a run as fragments: its weights, moments of 0, and adapters as they are built."""

import torch
from torch import nn

from kandinsky_dist.optim.adamw import build_adamw
from kandinsky_dist.parallel.base import ModelPlan
from kandinsky_dist.parallel.initial import InitialWeights


def test_weights_come_from_the_plan_and_the_rest_from_the_module_as_it_is_built():
    def build():
        module = nn.Linear(3, 2)
        nn.init.constant_(module.weight, 9.0)
        nn.init.constant_(module.bias, 4.0)
        return module

    weight = torch.arange(6.0).view(2, 3)
    source = InitialWeights(ModelPlan(build, lambda: {"weight": weight.to(torch.bfloat16)}, build_adamw))
    assert source.read("weight", "master", 1, 5).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert source.read("weight", "master", 0, 6).dtype == torch.float32
    assert source.read("bias", "master", 0, 2).tolist() == [4.0, 4.0]
    assert source.read("bias", "exp_avg", 0, 2).tolist() == [0.0, 0.0]
    assert source.read("weight", "exp_avg_sq", 2, 6).tolist() == [0.0] * 4
