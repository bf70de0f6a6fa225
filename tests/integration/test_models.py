"""Networks under real DeepSpeed, diffusers pipelines end to end, and a disk that fills up."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from helpers import forked
from PIL import Image
from safetensors.torch import load_file

from kandinsky_dist.errors import CheckpointError, ConfigError, DiskFullError
from kandinsky_dist.models.init import initialise
from kandinsky_dist.models.load import ModelSource
from kandinsky_dist.models.lora import WEIGHT_NAME, add_adapters, save_adapters
from kandinsky_dist.models.pipeline import generate, write_pipeline

pytestmark = pytest.mark.integration


def networks_under_zero_init(models: Path) -> int:
    """Prints what each network holds while zero-init is on, as JSON. Exit code 0."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from transformers import CLIPTextModelWithProjection
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from kandinsky_dist.models.frozen import (
        load_image_encoder,
        load_movq,
        load_text_encoder,
        outside_zero_init,
    )

    # The shared-memory extension takes a minute to compile and is not used with one process.
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    deepspeed.ops.__compatible_ops__[builder.NAME] = False
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    live = HfDeepSpeedConfig(config)  # transformers keeps a weak reference
    prior, decoder = models / "prior", models / "decoder"
    facts = {}

    def note(name, module):
        facts[name] = {
            "held": sum(parameter.numel() for parameter in module.parameters()),
            "dtypes": sorted({str(parameter.dtype) for parameter in module.parameters()}),
            "partitioned": sum(hasattr(parameter, "ds_id") for parameter in module.parameters()),
            "trained": sum(parameter.requires_grad for parameter in module.parameters()),
        }
        return module

    def plain():
        return CLIPTextModelWithProjection.from_pretrained(
            prior, subfolder="text_encoder", dtype=torch.float32
        )

    def ours(where):
        note(f"text {where}", load_text_encoder(prior, torch.float32, "cpu"))
        note(f"image {where}", load_image_encoder(prior, torch.bfloat16, "cpu"))
        movq = note(f"movq {where}", load_movq(decoder, torch.float32, "cpu", encode_only=True))
        with outside_zero_init():  # zero.Init makes torch.zeros half precision, too
            assert movq.encode(torch.zeros(1, 3, 64, 64)).latents.shape == (1, 4, 8, 8)

    note("plain live", plain())
    ours("live")
    with deepspeed.zero.Init(config_dict_or_path=config):
        note("plain init", plain())
        ours("init")
        try:
            with outside_zero_init():
                raise KeyError
        except KeyError:
            pass
        note("trained init", ModelSource(prior, "prior").build())
        ModelSource(prior, "prior").state_dict()
        adapted = ModelSource(prior, "prior").build()
        add_adapters(adapted, 2)
        note("adapted init", adapted)
        weight = adapted.transformer_blocks[0].attn1.to_q.lora_A["default"].weight
        with deepspeed.zero.GatheredParameters([weight]):
            facts["adapter"] = weight.detach().float().flatten().tolist()
    facts["live after"] = is_deepspeed_zero3_enabled()
    note("plain after", torch.nn.Linear(3, 3))
    print(json.dumps(facts), flush=True)
    del live
    os._exit(0)  # without leaving the process group, which is no subject here


def test_frozen_networks_stay_whole_under_zero_init(tiny_models):
    """The plain loader is the control: were zero-init left on, ours would look like it."""
    pytest.importorskip("deepspeed")
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    done = forked.call(networks_under_zero_init, tiny_models, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    text = load_file(tiny_models / "prior" / "text_encoder" / "model.safetensors")
    image = load_file(tiny_models / "prior" / "image_encoder" / "model.safetensors")
    movq = load_file(tiny_models / "decoder" / "movq" / "diffusion_pytorch_model.safetensors")
    encoder_half = {
        name: tensor for name, tensor in movq.items() if name.startswith(("encoder.", "quant_conv."))
    }
    for where in ("live", "init"):
        assert facts[f"plain {where}"]["held"] == 0, "the control must be partitioned"
        assert facts[f"plain {where}"]["dtypes"] == ["torch.bfloat16"]
        for name, weights, dtype in (
            ("text", text, "torch.float32"),
            ("image", image, "torch.bfloat16"),
            ("movq", encoder_half, "torch.float32"),
        ):
            expected = sum(tensor.numel() for tensor in weights.values())
            assert facts[f"{name} {where}"] == {
                "held": expected,
                "dtypes": [dtype],
                "partitioned": 0,
                "trained": 0,
            }, (name, where)
    assert facts["trained init"]["held"] == 0, "partitioning is back on after our loaders"
    assert facts["adapted init"]["trained"] == 4 * 8
    module = ModelSource(tiny_models / "prior", "prior").build()
    add_adapters(module, 2)
    expected = module.transformer_blocks[0].attn1.to_q.lora_A["default"].weight.to(torch.bfloat16).float()
    assert facts["adapter"] == expected.flatten().tolist(), "adapters do not depend on the strategy"
    assert facts["live after"] is True
    assert facts["plain after"]["held"] == 12


def changed(folder, component):
    """A network's weights with one of them moved, and that one's name."""
    weights = {name: tensor.clone() for name, tensor in ModelSource(folder, component).state_dict().items()}
    name = "proj_in.weight" if component == "prior" else "conv_in.weight"
    weights[name] += 1.0
    return weights, name


@pytest.fixture(scope="module")
def exported(tiny_models, tmp_path_factory) -> Path:
    """Both pipelines with one changed weight each."""
    out = tmp_path_factory.mktemp("export")
    for stage, component in (("prior", "prior"), ("decoder", "unet")):
        weights, _ = changed(tiny_models / stage, component)
        write_pipeline(tiny_models / stage, component, weights, out / stage)
    return out


def prompt_image(exported, out, **settings):
    generate(
        str(exported / "prior"),
        str(exported / "decoder"),
        prompt="a 3d emoji of fire engine",
        out=out,
        **{"size": 64, "num_prior_steps": 2, "num_decoder_steps": 2, "device": "cpu", **settings},
    )
    return Image.open(out)


@pytest.mark.parametrize(("stage", "component"), [("prior", "prior"), ("decoder", "unet")])
def test_a_written_pipeline_is_whole_and_holds_the_new_weights(tiny_models, exported, stage, component):
    from diffusers import DiffusionPipeline

    weights, name = changed(tiny_models / stage, component)
    pipe = DiffusionPipeline.from_pretrained(exported / stage)
    loaded = getattr(pipe, component).state_dict()
    assert torch.equal(loaded[name], weights[name])
    assert all(torch.equal(loaded[other], weights[other]) for other in weights)
    base = {path.relative_to(tiny_models / stage) for path in (tiny_models / stage).rglob("*")}
    assert {path.relative_to(exported / stage) for path in (exported / stage).rglob("*")} == base
    assert ModelSource(exported / stage, component).fingerprint == (
        ModelSource(tiny_models / stage, component).fingerprint
    )


def test_an_image_is_made_from_the_two_and_depends_on_seed_and_weights(tiny_models, exported, tmp_path):
    image = prompt_image(exported, tmp_path / "sub" / "image.png")
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["image.png"], "nothing temporary is left"
    again = prompt_image(exported, tmp_path / "again.png")
    other_seed = prompt_image(exported, tmp_path / "seed.png", seed=1)
    other_weights = prompt_image(tiny_models, tmp_path / "weights.png")
    assert image.tobytes() == again.tobytes()
    assert image.tobytes() != other_seed.tobytes()
    assert image.tobytes() != other_weights.tobytes()


@pytest.mark.filterwarnings(
    "ignore:`callback_steps` is deprecated:FutureWarning"
)  # diffusers warns of itself
def test_adapters_load_into_the_combined_pipeline(tiny_models, tmp_path):
    """The calls that a user makes after a LoRA run."""
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    for stage, component in (("prior", "prior"), ("decoder", "unet")):
        source = ModelSource(tiny_models / stage, component)
        module = source.build()
        add_adapters(module, 2)
        weights = {name: torch.full_like(tensor, 0.1) for name, tensor in module.state_dict().items()}
        save_adapters(source, 2, weights, tmp_path / component)
    components = DiffusionPipeline.from_pretrained(tiny_models / "prior").components
    pipe = AutoPipelineForText2Image.from_pretrained(
        tiny_models / "decoder", **{f"prior_{name}": part for name, part in components.items()}
    )
    pipe.set_progress_bar_config(disable=True)

    def image():
        steps = {"prior_num_inference_steps": 2, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", height=64, width=64, generator=generator, output_type="np", **steps).images[0]

    before = image()
    pipe.prior_prior.load_lora_adapter(str(tmp_path / "prior"), prefix=None, weight_name=WEIGHT_NAME)
    with_prior = image()
    pipe.unet.load_lora_adapter(str(tmp_path / "unet"), prefix=None, weight_name=WEIGHT_NAME)
    with_both = image()
    assert (before != with_prior).any()
    assert (with_prior != with_both).any()


def test_weights_of_another_network_leave_nothing(tiny_models, tmp_path):
    weights, name = changed(tiny_models / "prior", "prior")
    del weights[name]
    with pytest.raises(CheckpointError, match=r"proj_in\.weight is missing"):
        write_pipeline(tiny_models / "prior", "prior", weights, tmp_path / "out")
    with pytest.raises(ConfigError, match="is a KandinskyV22Pipeline"):
        write_pipeline(tiny_models / "decoder", "prior", weights, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(tiny_models, exported):
    weights, _ = changed(tiny_models / "prior", "prior")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_pipeline(tiny_models / "prior", "prior", weights, exported / "prior")


def test_half_precision_storage(tiny_models, tmp_path):
    weights, _ = changed(tiny_models / "prior", "prior")
    write_pipeline(tiny_models / "prior", "prior", weights, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_folders_swapped_are_refused_before_anything_is_loaded(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"^prior=.* is a KandinskyV22Pipeline"):
        generate(str(exported / "decoder"), str(exported / "prior"), prompt="x", out=tmp_path / "x.png")


def initialise_within_2_mib(out: Path, tokenizer: Path) -> str:
    """Makes networks where no file may be larger; the refusal."""
    # A limit on the size of a file stands in for a full disk: the write fails half-way, in the same place.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))
    try:
        initialise("tiny", out, tokenizer=str(tokenizer))
    except DiskFullError as error:
        return f"refused: {error}"
    return "made"


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tiny_models, tmp_path):
    done = forked.call(initialise_within_2_mib, tmp_path / "m", tiny_models / "prior")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"refused: {tmp_path / 'm'} cannot be written: its disk is full or a quota is used up; "
        "nothing was kept"
    )
    assert list(tmp_path.iterdir()) == []


def test_init_says_that_it_keeps_what_stands(tiny_models, capsys):
    from kandinsky_dist import cli

    assert cli.main(["models", "init", "--size", "tiny", str(tiny_models)]) == 0
    line = (
        f"{tiny_models} holds tiny networks of seed 0: kept, statistics included; remove it to make them anew"
    )
    assert line in capsys.readouterr().err
