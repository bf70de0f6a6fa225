"""A DeepSpeed file is completed by what the run owns; a contradiction is one line that names the key."""

import json

import pytest
import torch

from kandinsky_dist.config import loader
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.parallel.ds_config import complete, shipped_file


def settings_of(strategy, file=None, *, precision=torch.bfloat16, **values):
    layers = [loader.Layer("test", {"parallel.strategy": strategy, **values})]
    if file is not None:
        layers.append(loader.Layer("test", {"parallel.ds_config": str(file)}))
    return complete(loader.load("prior", None, layers).config, world_size=2, num_micro=4, precision=precision)


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
def test_the_shipped_file_is_completed(strategy):
    found = settings_of(strategy, **{"parallel.bucket_mib": 10.0})
    assert found["zero_optimization"]["stage"] == int(strategy[-1])
    assert found["train_micro_batch_size_per_gpu"] * 2 * found["gradient_accumulation_steps"] == 64
    assert found["bf16"]["enabled"] is True
    assert found["zero_optimization"]["reduce_bucket_size"] == 10 * 2**20 // 2
    assert found["gradient_clipping"] == (0.0 if strategy == "zero0" else 1.0)


def test_a_bucket_of_any_size_is_one_that_deepspeed_takes():
    sizes = [settings_of("zero2", **{"parallel.bucket_mib": mib}) for mib in (0.010006, 1e-9)]
    assert [found["zero_optimization"]["allgather_bucket_size"] for found in sizes] == [5246, 2]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_a_file_leaves_open_is_overlapped_as_the_run_says(strategy, overlap):
    assert "overlap_comm" not in json.loads(shipped_file(strategy).read_text())["zero_optimization"]
    found = settings_of(strategy, **{"parallel.overlap": overlap})
    assert found["zero_optimization"]["overlap_comm"] is overlap


def test_a_file_without_overlap_is_left_alone(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}}))
    assert settings_of("zero2", file)["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_offloading_keeps_our_optimizer(strategy):
    found = settings_of(strategy, shipped_file(f"{strategy}_offload"))
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_force_ds_cpu_optimizer"] is False
    offloads_weights = "offload_param" in found["zero_optimization"]
    assert offloads_weights is (strategy == "zero3")


def test_a_users_own_settings_stay_and_auto_means_the_runs(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "zero_optimization": {"reduce_bucket_size": 123, "round_robin_gradients": True},
            }
        )
    )
    found = settings_of("zero2", file)
    assert found["train_batch_size"] == 64
    assert found["zero_optimization"]["reduce_bucket_size"] == 123
    assert found["zero_optimization"]["round_robin_gradients"] is True


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"train_batch_size": 32}, r"train_batch_size=32, the run has 64 \(data\.global_batch_size\)"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage=3, the run has 2"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled=False, the run has True \(parallel\.precision\)"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
            r"offload_optimizer\.device=nvme, where checkpoints cannot read",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"offload_optimizer\.ratio=0\.5, for which DeepSpeed makes a second optimizer",
        ),
        (
            {
                "zero_force_ds_cpu_optimizer": True,
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
            },
            r"zero_force_ds_cpu_optimizer=True, the run has False",
        ),
        ({"optimizer": {"type": "AdamW"}}, r"sets optimizer, which optim\.\* owns"),
    ],
)
def test_a_contradiction_is_one_line(content, line, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=line):
        settings_of("zero2", file)


def test_what_a_file_leaves_open_about_the_loss_scale_is_as_elsewhere(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}}))
    found = settings_of("zero2", file, precision=torch.float16)
    assert found["bf16"]["enabled"] is False
    assert found["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 2000,
        "min_loss_scale": 1,
        "hysteresis": 2,
    }
    assert settings_of("zero2", file)["fp16"]["enabled"] is False


def test_a_fixed_loss_scale_is_refused(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"fp16": {"loss_scale": 128}}))
    with pytest.raises(ConfigError, match=r"fp16\.loss_scale=128, the run has 0 \(which is a dynamic one\)"):
        settings_of("zero2", file, precision=torch.float16)


def test_a_file_that_overlaps_contradicts_a_run_that_does_not(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    with pytest.raises(ConfigError, match=r"overlap_comm=True, the run has False \(parallel\.overlap\)"):
        settings_of("zero2", file, **{"parallel.overlap": False})
