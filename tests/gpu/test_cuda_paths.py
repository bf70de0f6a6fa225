"""What only a GPU does: encoders beside training, pinned copies, layouts, kernels, compilation, snapshots."""

import pytest
import torch
import torch.distributed as dist
from helpers.objective import configuration
from torch import nn

from kandinsky_dist.config import loader as config_loader
from kandinsky_dist.config.schema import TelemetryConfig
from kandinsky_dist.data.batch import Batch
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.models import compiled
from kandinsky_dist.models.blocks import SDPA_KERNELS, check_attention
from kandinsky_dist.models.layout import lay_out_activations
from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.runtime.process import Process, joined
from kandinsky_dist.telemetry.meter import Meter
from kandinsky_dist.telemetry.profile import Profiler
from kandinsky_dist.train import build, corpora
from kandinsky_dist.train.feed import Feed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device():
    return torch.device("cuda", 0)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", compiled.CACHE_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and whatever is set inside goes with it
    with joined() as process:
        yield process
    assert not dist.is_initialized()


def batches(device, count):
    for number in range(count):
        positions_B = torch.arange(4, device=device) + 4 * number
        yield [Batch(positions_B, ["a"] * 4, None, None, None, None)]


def test_encoders_run_beside_training_and_training_waits_for_them(alone, device):
    streams = []

    def prepare(batch: Batch) -> Prepared:
        streams.append(torch.cuda.current_stream(device))
        torch.cuda._sleep(50_000_000)  # far longer than it takes the host to come to the sum below
        return Prepared(batch.positions_B, batch.positions_B.float() + 1, {})

    feed = Feed(batches(device, 3), prepare, StopRequest(), device)
    training = torch.cuda.current_stream(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = []
        for _ in range(3):
            (prepared,) = feed.take().prepared
            sums.append(prepared.clean.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        feed.close()
    assert [value.item() for value in sums] == [10.0, 26.0, 42.0]
    assert len(set(streams)) == 1
    assert streams[0] != training


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned_and_arrive_whole(num_workers, tiny_models, small_corpus, device):
    settings = (f"data.num_workers={num_workers}", "data.micro_batch_size=4")
    config = configuration("prior", *settings, models=tiny_models, corpus=small_corpus)
    order = corpora.training_order(config)
    folder = build.Folders.of(config).prior
    on_gpu, on_host = (
        corpora.build_loader(config, folder, order, Process(0, 0, 1, where), is_training=True)
        for where in (device, torch.device("cpu"))
    )
    host = on_gpu._batches(lambda: iter([range(4)]))
    assert all(tensor.is_pinned() for tensor in next(host).tensors())
    host.close()
    gpu_steps, host_steps = on_gpu.steps(0), on_host.steps(0)
    for _ in range(3):
        for mine, expected in zip(next(gpu_steps), next(host_steps), strict=True):
            for found, tensor in zip(mine.tensors(), expected.tensors(), strict=True):
                assert found.device == device
                assert torch.equal(found.cpu(), tensor)
    gpu_steps.close()
    host_steps.close()


@pytest.mark.parametrize("attention", SDPA_KERNELS)
def test_every_kernel_is_there_in_bf16(attention, device):
    check_attention(attention, device, torch.bfloat16, is_masked=False)


def test_flash_takes_no_mask(device):
    with pytest.raises(ConfigError, match="has no kernel here for bfloat16 on cuda with a mask"):
        check_attention("flash", device, torch.bfloat16, is_masked=True)


def test_convolutions_answer_in_channels_last_and_gradients_stay_flat(device):
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3)
    )
    layers.to(device)
    pixels_BCHW = torch.randn(2, 8, 16, 16, device=device)
    expected = layers(pixels_BCHW)
    lay_out_activations(layers, channels_last=True)
    with torch.autocast("cuda", torch.bfloat16):
        found = layers(pixels_BCHW)
    assert found.is_contiguous(memory_format=torch.channels_last)
    found.float().square().mean().backward()
    assert all(parameter.grad.is_contiguous() for parameter in layers.parameters())
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_a_compiled_step_is_the_same_step(tiny_models, small_corpus, tmp_path, alone):
    from kandinsky_dist.train.trainer import Trainer

    losses = {}
    for is_compiled in (False, True):
        base = configuration("prior", models=tiny_models, corpus=small_corpus)
        values = {
            "model.prior": base.model.prior,
            "data.shards": base.data.shards,
            "data.global_batch_size": 8,
            "data.num_workers": 0,
            "run.dir": str(tmp_path / str(is_compiled)),
            "run.max_steps": 3,
            "telemetry.log_every_steps": 1,
            "telemetry.report_to": (),
            "parallel.compile": is_compiled,
        }
        trainer = Trainer(
            config_loader.load("prior", None, [config_loader.Layer("test", values)]), alone, StopRequest()
        )
        before = compiled.num_graphs()
        found = losses[is_compiled] = []
        add = trainer.losses.add
        trainer.losses.add = lambda loss, outcome, add=add, found=found: (
            found.append(loss),
            add(loss, outcome),
        )
        trainer.run()
        assert (compiled.num_graphs() > before) == is_compiled
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), atol=0.02, rtol=0.02)


def test_a_profile_has_kernels_and_a_memory_snapshot(tmp_path, device):
    meter = Meter(1, device)
    profiler = Profiler(TelemetryConfig(profile=("1",)), tmp_path, Process(0, 0, 1, device), meter.pause)
    with profiler.step(1):
        torch.randn(256, 256, device=device) @ torch.randn(256, 256, device=device)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "steps_00000001_00000001_rank_00000.json.gz",
        "memory_00000001_00000001_rank_00000.pickle",
    }
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
