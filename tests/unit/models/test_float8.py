"""float8 changes how matrices are multiplied, and nothing that optimizer or checkpoint can see."""

import copy

import pytest
import torch
from torch import nn

from kandinsky_dist.bench.workload import build
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models import float8


def test_names_shapes_and_types_of_weights_stay():
    pytest.importorskip("torchao", reason="needs pip install 'kandinsky-dist[float8]'")
    module = build("prior", "tiny")
    before = [(name, item.shape, item.dtype) for name, item in module.named_parameters()]
    weights = copy.deepcopy(module.state_dict())
    float8.use_float8(module, emulate=True)
    assert [(name, item.shape, item.dtype) for name, item in module.named_parameters()] == before
    assert all(torch.equal(item, weights[name]) for name, item in module.state_dict().items())
    changed = {name.split(".")[0] for name, item in module.named_modules() if type(item) is not nn.Linear}
    kept = {name for name, item in module.named_modules() if type(item) is nn.Linear}
    assert "transformer_blocks" in changed
    assert kept
    assert not any(name.startswith("transformer_blocks") for name in kept)


def test_a_machine_without_float8_is_one_line(monkeypatch):
    monkeypatch.setattr(float8, "require", lambda *_, **__: None)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"parallel\.float8=true needs a CUDA GPU and none is here"):
            float8.refuse_unless_here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"8\.9 \(Ada, Hopper\) or more, NVIDIA A100 has 8\.0"):
        float8.refuse_unless_here()
