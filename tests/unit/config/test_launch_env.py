import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_dist.config.launch_env import accelerate_layer
from kandinsky_dist.config.loader import command_line_layer, load
from kandinsky_dist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = REPOSITORY / "launch" / "accelerate"
DDP = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO", "WORLD_SIZE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "false"}
ZERO2 = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "WORLD_SIZE": "2",
}


def settings(environ: dict[str, str]) -> dict:
    layer = accelerate_layer(environ)
    assert layer is not None
    return dict(layer.values)


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        accelerate_layer(environ)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def test_other_launchers_give_no_layer():
    assert accelerate_layer({}) is None
    assert accelerate_layer({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}) is None


@pytest.mark.parametrize(("word", "precision"), [("no", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_mixed_precision_becomes_precision(word, precision):
    assert settings({"ACCELERATE_MIXED_PRECISION": word}) == {"parallel.precision": precision}


def test_processes_without_deepspeed_are_ddp():
    assert settings(DDP) == {"parallel.precision": "bf16", "parallel.strategy": "ddp"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage_becomes_strategy(stage):
    values = settings({**ZERO2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
    assert values["parallel.strategy"] == f"zero{stage}"


def test_fsdp_2_becomes_its_strategy_and_settings():
    environ = {**DDP, **FSDP, "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
    bf16 = {"parallel.precision": "bf16", "parallel.strategy": "fsdp2"}
    assert settings(environ) == bf16
    assert settings({**environ, "FSDP_RESHARD_AFTER_FORWARD": "false"}) == {
        **bf16,
        "parallel.reshard_after_forward": False,
    }
    assert settings({**environ, "FSDP_ACTIVATION_CHECKPOINTING": "true"}) == {
        **bf16,
        "parallel.gradient_checkpointing": True,
    }


def test_deepspeed_file_is_handed_on_and_wins_over_accelerates_own_words(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    environ = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }
    assert settings(environ) == {
        "parallel.precision": "bf16",
        "parallel.ds_config": str(path),
        "parallel.strategy": "zero3",
    }


def test_a_deepspeed_file_may_ask_for_fp16(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}))
    values = settings({**ZERO2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert values["parallel.precision"] == "fp16"


def test_a_file_that_leaves_the_stage_open_takes_accelerates(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}))
    values = settings({**ZERO2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert (values["parallel.strategy"], values["parallel.precision"]) == ("zero2", "bf16")


@pytest.mark.parametrize("text", [None, "{"])
def test_unreadable_deepspeed_file_is_named(tmp_path, text):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    assert str(path) in refusal({**ZERO2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_gradient_clipping_becomes_max_grad_norm():
    assert settings({**ZERO2, "ACCELERATE_GRADIENT_CLIPPING": "0.5"})["optim.max_grad_norm"] == 0.5
    assert "optim.max_grad_norm" not in settings({**ZERO2, "ACCELERATE_GRADIENT_CLIPPING": "none"})


@pytest.mark.parametrize(
    ("variables", "seen", "remedy"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version=1", "set it to 2"),
        (FSDP, "fsdp_version=1", "set it to 2"),
        (
            {**FSDP, "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params",
            "DEEPSPEED",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm", "DEEPSPEED"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "use_parallelism_config", "DEEPSPEED"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=inductor", "no"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device=cpu", "none"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device=nvme", "none"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient_accumulation_steps=4",
            "data.global_batch_size",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision=fp8", "bf16"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_remedy(variables, seen, remedy):
    message = refusal({**ZERO2, **variables})
    assert seen in message
    assert remedy in message


def test_an_accumulation_that_says_nothing_passes():
    for steps in ("1", "auto"):
        settings({**ZERO2, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": steps})


def test_recipe_then_accelerate_then_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("parallel: {strategy: zero1, precision: fp32, bucket_mib: 7}\n")
    layer = accelerate_layer(ZERO2)
    assert layer is not None
    resolved = load("prior", str(path), [layer, command_line_layer(["--parallel.precision", "auto"])])
    parallel = resolved.config.parallel
    assert (parallel.strategy, parallel.precision, parallel.bucket_mib) == ("zero2", "auto", 7.0)
    assert resolved.origins["parallel.strategy"] == "accelerate"
    assert resolved.origins["parallel.precision"] == "command line"


def test_reads_the_environment_without_torch():
    code = "import sys, kandinsky_dist.config.launch_env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.integration
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_our_files_say_their_strategy_through_accelerates_own_launcher(strategy, tmp_path):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    printer = tmp_path / "printer.py"
    printer.write_text(
        "import json, os, pathlib\n"
        "path = pathlib.Path(__file__).with_name('rank' + os.environ['RANK'] + '.json')\n"
        "path.write_text(json.dumps(dict(os.environ)))\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{FILES}/{strategy}.yaml",
    ]
    command += ["--num_processes", "2", "--main_process_port", "0", str(printer)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    expected = {"parallel.precision": "bf16", "parallel.strategy": strategy}
    if strategy == "fsdp2":
        expected["parallel.reshard_after_forward"] = True
    for rank in (0, 1):
        assert settings(json.loads((tmp_path / f"rank{rank}.json").read_text())) == expected
