"""One test for each fault of the trainer that this project replaces, by its number in the list of faults.

Runs are made once and shared; all are tiny, on one or two real processes.
"""

import ast
import shutil
import typing
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from diffusers.optimization import get_scheduler
from helpers.campaign import cases
from helpers.command import keys, losses, metrics
from helpers.forked import train
from helpers.objective import Recorder, batch_at, configuration, loader_of, objective_of
from safetensors.torch import load_file

import kandinsky_dist
from kandinsky_dist.checkpoint.layout import CheckpointReader, checkpoints_of, damage
from kandinsky_dist.cli import main
from kandinsky_dist.config.schema import KEYS, SECTIONS
from kandinsky_dist.data.catalogue import read_manifest
from kandinsky_dist.data.order import Order
from kandinsky_dist.models.lora import WEIGHT_NAME
from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.optim.adamw import is_decayed
from kandinsky_dist.runtime import rng
from kandinsky_dist.runtime.hashing import Stream
from kandinsky_dist.train import build

pytestmark = pytest.mark.integration

WEIGHTS = "diffusion_pytorch_model.safetensors"
DECAY = ("optim.weight_decay=100", "optim.learning_rate=1e-3")  # a tenth of each decayed weight a step


@pytest.fixture(scope="module")
def run(tiny_models, small_corpus, tmp_path_factory):
    """run(name, stage, *settings, **kwargs) -> its folder; a run of that name is made once."""
    made: dict[str, Path] = {}

    def make(name, stage, *settings, **kwargs):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            done = train(stage, *settings, models=tiny_models, corpus=small_corpus, run_dir=folder, **kwargs)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            made[name] = folder
        return made[name]

    return make


SCHEDULED = ("run.max_steps=4", "optim.lr_scheduler=cosine", "optim.lr_warmup_steps=2")
LAYOUTS = [(1, 2), (2, 2), (1, 4), (2, 4)]
"""World size and micro-batch size: 4, 2, 2 and 1 accumulated micro-batches, all of one global batch of 8."""


@pytest.fixture(scope="module")
def of_layout(run):
    """of_layout(world size, micro-batch size) -> the folder of a run."""

    def make(world_size, micro_batch_size):
        settings = (*SCHEDULED, f"data.micro_batch_size={micro_batch_size}")
        return run(f"layout_{world_size}_{micro_batch_size}", "prior", *settings, world_size=world_size)

    return make


@pytest.fixture(scope="module")
def zero2_prior(run):
    settings = (*DECAY, "run.max_steps=2", "checkpoint.every_steps=1")
    return run("zero2_prior", "prior", *settings, world_size=2, strategy="zero2", timeout=90)


@pytest.fixture(scope="module")
def zero3_prior(run):
    settings = ("run.max_steps=2", "checkpoint.every_steps=1")
    return run("zero3_prior", "prior", *settings, world_size=2, strategy="zero3", timeout=90)


@pytest.fixture(scope="module")
def decoder_run(run):
    return run("decoder", "decoder", *DECAY)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(run folder) -> the folder that `kandinsky-dist export` makes of it, made once."""
    made: dict[Path, Path] = {}

    def make(run_dir):
        if run_dir not in made:
            out = tmp_path_factory.mktemp("exported") / "pipeline"
            assert main(["export", str(run_dir), str(out)]) == 0
            made[run_dir] = out
        return made[run_dir]

    return make


@pytest.mark.dist
def test_b1_prior_trains_on_two_ranks(of_layout):
    """The prior's two statistics are parameters that no forward pass uses; DDP waited for their gradients."""
    alone, together = of_layout(1, 8), of_layout(2, 2)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert sorted(path.name for path in (together / "audit").iterdir()) == [
        "rank_00000.jsonl",
        "rank_00001.jsonl",
    ]


@pytest.mark.dist
@pytest.mark.parametrize("stage", cases(["prior", "decoder"], lambda stage: stage == "prior"))
def test_b2_b3_lora_trains_in_step_on_two_ranks(stage, run, exported, tiny_models):
    """Adapter training died at start; where it ran, each rank trained adapters of its own.

    A rank that did not hear of the other's gradients has another loss from the second step on, and its half
    of the checkpoint does not fit the rest.
    """
    settings = ("model.variant=lora", "run.max_steps=3", "optim.learning_rate=2e-2")
    alone = run(f"lora_{stage}", stage, *settings)
    together = run(f"lora_{stage}_2", stage, *settings, world_size=2)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    adapters, expected = (load_file(exported(folder) / WEIGHT_NAME) for folder in (together, alone))
    assert adapters.keys() == expected.keys()
    # As a whole, not one by one: Adam blows the rounding of a vanishing gradient up to a full step.
    ours, theirs = (
        torch.cat([tensors[name].flatten() for name in expected]) for tensors in (adapters, expected)
    )
    assert (ours - theirs).norm() < 0.01 * theirs.norm()
    module = load_pipeline(tiny_models / stage, stage)
    module.load_lora_adapter(exported(together), prefix=None, weight_name=WEIGHT_NAME)
    loaded = {name: parameter for name, parameter in module.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapters)
    for name, parameter in loaded.items():
        assert torch.equal(parameter, adapters[name.replace(".default_0.", ".")]), name
        assert "lora_B" not in name or parameter.any(), f"{name} was never trained"


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_b4_sharded_checkpoint_is_written_by_all_ranks(strategy, request, tiny_models):
    """A save that needs every rank was called on the first alone, and waited for ever.

    The run saves after each of its two steps and has to end in time; together the ranks' files hold every
    trained value once.
    """
    folder = request.getfixturevalue(f"{strategy}_prior")
    checkpoints = checkpoints_of(folder / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_00000002", "step_00000001"]
    base = load_file(tiny_models / "prior" / "prior" / WEIGHTS)
    for path in checkpoints:
        assert damage(path) is None
        files = [load_file(path / f"rank_{rank:05d}.safetensors") for rank in range(2)]
        assert all(files), "each rank owns a part"
        reader = CheckpointReader(path)
        assert reader.numels.keys() == base.keys() - {"clip_mean", "clip_std"}
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            held = sum(
                tensor.numel() for file in files for name, tensor in file.items() if name.endswith("/" + kind)
            )
            assert held == sum(reader.numels.values()), kind
        for name, numel in reader.numels.items():
            assert reader.read(name, "master", 0, numel).numel() == base[name].numel(), name


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "micro_batch_size"), cases(LAYOUTS, LAYOUTS[:2].__contains__))
def test_b5_learning_rates_depend_on_the_step_alone(world_size, micro_batch_size, of_layout):
    """The schedule advanced once a rank and micro-batch, so it was right for one layout only."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=4)
    expected = []
    for _ in range(4):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert len(set(expected)) > 2
    folder, whole = of_layout(world_size, micro_batch_size), of_layout(1, 8)
    for run_dir in (folder, whole):
        assert [entry["learning_rate"] for entry in metrics(run_dir)] == pytest.approx(expected)
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_b6_no_two_samples_of_a_batch_share_noise(stage, tiny_models, small_corpus):
    """Every rank seeded the same generator, so all drew the same noise and timesteps.

    What a model is given on two ranks is, by position, what it is given on one, and nothing occurs twice.
    """
    config = configuration(stage, models=tiny_models, corpus=small_corpus)
    objective = objective_of(config)

    def given(rank, world_size):
        steps = loader_of(config, rank=rank, world_size=world_size).steps(0)
        found = {}
        for batch in next(steps):
            recorder, prepared = Recorder(), objective.prepare(batch)
            objective.losses(recorder, prepared)
            alphas_B = objective.schedule.alphas_cumprod_T[recorder.calls[0].timesteps_B]
            alphas = alphas_B.view(-1, *[1] * (prepared.clean.dim() - 1))
            noise = (recorder.calls[0].noised - alphas.sqrt() * prepared.clean) / (1 - alphas).sqrt()
            rows = zip(batch.positions_B.tolist(), recorder.calls[0].timesteps_B.tolist(), noise, strict=True)
            found |= {position: (timestep, noise) for position, timestep, noise in rows}
        steps.close()
        return found

    alone, ranks = given(0, 1), [given(rank, 2) for rank in range(2)]
    assert sorted(alone) == list(range(8))
    assert [sorted(found) for found in ranks] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for position, (timestep, noise) in {**ranks[0], **ranks[1]}.items():
        assert timestep == alone[position][0]
        torch.testing.assert_close(noise, alone[position][1], rtol=1e-3, atol=1e-3)
        assert 0.3 < noise.std() < 2, "standard normal"
    flat = torch.stack([noise.flatten() for _, noise in alone.values()])
    assert torch.pdist(flat).min() > 1
    assert len({timestep for timestep, _ in alone.values()}) > 4


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_b7_noise_is_added_in_fp32_around_half_precision_networks(stage, tiny_models, small_corpus):
    """In bf16 the prior's noise level was 0 for 21 timesteps: nothing to denoise, nothing learnt."""
    config = configuration(stage, models=tiny_models, corpus=small_corpus)
    objective = objective_of(config, torch.bfloat16)
    batch = batch_at(loader_of(config), range(8))
    prepared, recorder = objective.prepare(batch), Recorder()
    assert next(objective.image_encoder.parameters()).dtype == torch.bfloat16
    assert prepared.clean.dtype == torch.float32
    lost = {"prior": 21, "decoder": 2}[stage]
    half = objective.schedule.alphas_cumprod_T.to(torch.bfloat16)
    assert int(((1 - half) == 0).sum()) == lost, "the control: what bf16 would have lost"
    # The same samples at a position for each timestep that bf16 loses.
    positions_B = torch.arange(40_000)
    positions_B = positions_B[rng.integers(config.run.seed, Stream.TIMESTEP, positions_B, 1000) < lost]
    many = Prepared(
        positions_B,
        prepared.clean[positions_B % 8],
        {name: value[positions_B % 8] for name, value in prepared.conditions.items()},
    )
    objective.losses(recorder, many)
    (call,) = recorder.calls
    assert call.noised.dtype == torch.float32
    assert call.timesteps_B.unique().tolist() == list(range(lost))
    betas = {"prior": ("squaredcos_cap_v2", 0, 0), "decoder": ("linear", 0.00085, 0.012)}[stage]
    scheduler = DDPMScheduler(beta_schedule=betas[0], beta_start=betas[1], beta_end=betas[2])
    alphas_B = scheduler.alphas_cumprod[call.timesteps_B].double()
    alphas = alphas_B.view(-1, *[1] * (many.clean.dim() - 1))
    noise = (call.noised.double() - alphas.sqrt() * many.clean.double()) / (1 - alphas).sqrt()
    for timestep in range(lost):
        assert noise[call.timesteps_B == timestep].std() == pytest.approx(1.0, abs=0.1), timestep


def test_b8_local_decoder_folder_trains_and_exports(decoder_run, exported, tiny_models):
    """A decoder from a local folder trained to its end and then could not be saved."""
    weights = load_file(exported(decoder_run) / "unet" / WEIGHTS)
    base = load_file(tiny_models / "decoder" / "unet" / WEIGHTS)
    assert weights.keys() == base.keys()
    still = [name for name in base if torch.equal(weights[name], base[name])]
    assert not still, "every tensor was trained"


def test_b9_exported_decoder_has_the_movq_it_was_trained_with(decoder_run, exported, tiny_models):
    """The autoencoder was handed over under a name that the pipeline does not know, and dropped."""
    out, base = exported(decoder_run), tiny_models / "decoder"
    pipeline = KandinskyV22Pipeline.from_pretrained(out)
    ours, theirs = pipeline.movq.state_dict(), load_file(base / "movq" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trained = load_file(out / "unet" / WEIGHTS)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in pipeline.unet.state_dict().items())


RESUMED = (
    "data.global_batch_size=16",
    "data.micro_batch_size=8",
    "checkpoint.every_steps=2",
    "checkpoint.keep=2",
)


@pytest.fixture(scope="module")
def resumed(tiny_models, small_corpus, tmp_path_factory):
    """A run of 4 of 8 steps, 6 of them an epoch; damaged newer checkpoints; and its continuation."""
    folder = tmp_path_factory.mktemp("resumed") / "run"

    def start(*settings):
        return train("prior", *RESUMED, *settings, models=tiny_models, corpus=small_corpus, run_dir=folder)

    first = start("run.max_steps=4")
    assert first.returncode == 0, first.stderr
    whole = folder / "checkpoints" / "step_00000004"
    shutil.copytree(whole, whole.with_name("step_00000005.tmp"))
    shutil.copytree(whole, whole.with_name("step_00000009"), ignore=shutil.ignore_patterns("COMMIT"))
    cut = shutil.copytree(whole, whole.with_name("step_00000010")) / "rank_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    second = start("run.max_steps=8")
    assert second.returncode == 0, second.stderr
    return folder, second


def test_b11_resume_continues_the_epoch(resumed, small_corpus):
    """A resumed run started its epoch anew in another order: some samples came twice, some never."""
    folder, _ = resumed
    order = Order([read_manifest(str(small_corpus / "train"))], seed=0)
    found = keys(folder)
    assert list(found) == list(range(1, 9))
    for step, names in found.items():
        places = order.locate(range(16 * (step - 1), 16 * step)).each()
        assert names == sorted(f"{32 * place.shard + place.index:05d}" for place in places), step
    epoch = [name for step in range(1, 7) for name in found[step]]
    assert len(set(epoch)) == len(epoch) == 96, "an epoch holds every sample once"


def test_b11_unfinished_checkpoints_are_never_picked_up(resumed):
    """The newest folder was taken whatever was in it, also one that a kill had left half written."""
    _, done = resumed
    said = done.stderr.splitlines()
    assert any("step_00000004 at sample 64" in line for line in said), said
    for name in ("step_00000009", "step_00000010"):
        assert any("passed over" in line and name in line for line in said), (name, said)


def test_b11_old_checkpoint_outlives_a_failed_save(tiny_models, small_corpus, tmp_path):
    """The oldest checkpoint was deleted to make room before its successor was there.

    Two are kept and there are two; the third cannot be written because a file has its place.
    """
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000003.1.tmp").write_text("in the way")
    done = train(
        "prior",
        *("run.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=2"),
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path / "run",
    )
    assert done.returncode == 1, done.stderr
    assert "checkpoint not written: rank 0: FileExistsError" in done.stderr
    kept = checkpoints_of(checkpoints)
    assert [path.name for path in kept] == ["step_00000002", "step_00000001"]
    assert [damage(path) for path in kept] == [None, None]


def test_b13_dropped_captions_are_the_pipelines_negative_prompt(tiny_models, small_corpus):
    """The prior never saw the empty caption that guidance steers away from."""
    config = configuration("prior", "data.caption_dropout=0.2", models=tiny_models, corpus=small_corpus)
    pipeline = KandinskyV22PriorPipeline.from_pretrained(tiny_models / "prior")
    with torch.no_grad():
        states = pipeline._encode_prompt("anything", "cpu", 1, True, negative_prompt=None)
        negative = [tensor[0] for tensor in states]
    batch = batch_at(loader_of(config), range(480))
    length = batch.text_length
    negative = [
        tensor[:length] if tensor.dim() > 1 or tensor.dtype == torch.bool else tensor for tensor in negative
    ]
    empty_L = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0, :length]
    is_dropped_B = (batch.token_ids_BL == empty_L).all(1)
    assert is_dropped_B.sum() == pytest.approx(96, abs=4 * (480 * 0.2 * 0.8) ** 0.5)
    assert 0 < is_dropped_B[:96].sum() < 96, "a sample is not dropped for ever: it is by position"
    rows = is_dropped_B.nonzero().flatten()[:4]
    kept = (~is_dropped_B).nonzero().flatten()[:4]
    picked = batch._map(lambda tensor: tensor[torch.cat([rows, kept])])
    conditions = objective_of(config).prepare(picked).conditions
    names = ("proj_embedding", "encoder_hidden_states", "attention_mask")
    for name, expected in zip(names, negative, strict=True):
        for row in range(4):
            torch.testing.assert_close(conditions[name][row], expected, rtol=1e-5, atol=1e-5, msg=name)
        assert not any(torch.equal(conditions[name][row], expected) for row in range(4, 8)), name


def test_b13_dropped_image_embeddings_are_the_pipelines_zero_embedding(tiny_models, small_corpus):
    """The decoder never saw the embedding of a black image, which guidance steers away from."""
    setting = "data.image_embedding_dropout=0.2"
    config = configuration("decoder", setting, models=tiny_models, corpus=small_corpus)
    objective = objective_of(config)
    pipeline = KandinskyV22PriorPipeline.from_pretrained(tiny_models / "prior")
    zero_D = pipeline.get_zero_embed(1, "cpu")[0]
    embeds_BD = torch.randn(1000, len(zero_D))
    prepared = Prepared(torch.arange(1000), torch.randn(1000, 4, 2, 2), {"image_embeds": embeds_BD})
    recorder = Recorder()
    objective.losses(recorder, prepared)
    given_BD = recorder.calls[0].conditions["added_cond_kwargs"]["image_embeds"]
    is_dropped_B = (given_BD != embeds_BD).all(1)
    assert is_dropped_B.sum() == pytest.approx(200, abs=4 * (1000 * 0.2 * 0.8) ** 0.5)
    torch.testing.assert_close(given_BD[is_dropped_B], zero_D.expand(int(is_dropped_B.sum()), -1))
    assert torch.equal(given_BD[~is_dropped_B], embeds_BD[~is_dropped_B])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "strategy"),
    cases(
        [("prior", "zero2"), ("decoder", "ddp"), ("prior", "ddp"), ("decoder", "zero2")],
        lambda case: case in {("prior", "zero2"), ("decoder", "ddp")},  # whose runs other tests make
    ),
)
def test_b14_decay_spares_statistics_and_variance_rows(stage, strategy, run, exported, tiny_models, request):
    """Decay of everything would shrink what no gradient holds up: clip_std, and conv_out's variance half.

    Two steps of decay by a tenth; what decays has lost a fifth, what does not is bit for bit as before.
    """
    if (stage, strategy) == ("decoder", "ddp"):
        folder = request.getfixturevalue("decoder_run")
    elif (stage, strategy) == ("prior", "zero2"):
        folder = request.getfixturevalue("zero2_prior")
    else:
        folder = run(f"decay_{stage}_{strategy}", stage, *DECAY, world_size=2, strategy=strategy)
    component = {"prior": "prior", "decoder": "unet"}[stage]
    base = load_file(tiny_models / stage / component / WEIGHTS)
    weights = load_file(exported(folder) / component / WEIGHTS)
    if stage == "prior":
        held = {name: slice(None) for name in ("clip_mean", "clip_std")}
    else:
        held = {name: slice(4, 8) for name in ("conv_out.weight", "conv_out.bias")}
    for name, rows in held.items():
        assert torch.equal(weights[name][rows], base[name][rows]), name
    decayed = [name for name in base if name not in held and is_decayed(name, base[name])]
    assert len(decayed) > 20
    for name in decayed:
        ratio = ((weights[name] * base[name]).sum() / (base[name] * base[name]).sum()).item()
        assert ratio == pytest.approx(0.81, abs=0.05), name
    if stage == "decoder":
        assert not torch.equal(weights["conv_out.weight"][:4], base["conv_out.weight"][:4])


def test_b16_every_option_is_read_by_what_it_is_about():
    """Options were parsed, printed and used nowhere.

    Looks through the package's syntax, without the code that only declares and checks options.
    """
    package = Path(kandinsky_dist.__file__).parent
    read = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        if path.parent.name == "config":
            wanted = {"num_micro", "run_dir"} if path.name == "resolve.py" else set()
            nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        else:
            nodes = [tree]
        for node in (node for top in nodes for node in ast.walk(top)):
            if isinstance(node, ast.Attribute):
                read.add((getattr(node.value, "attr", getattr(node.value, "id", "")), node.attr))
    unread = [
        key
        for key in KEYS
        if not {(key.split(".")[0], key.split(".")[1]), ("config", key.split(".")[1])} & read
        and not has_one_value(key)
    ]
    assert unread == []


def has_one_value(key):
    """Whether there is nothing to choose, so nothing to read: any other value is refused."""
    section, name = key.split(".")
    return len(typing.get_args(typing.get_type_hints(SECTIONS[section])[name])) == 1


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("prior", "data.resolution=64"),
        ("prior", "data.image_embedding_dropout=0.1"),
        ("decoder", "data.caption_dropout=0.1"),
    ],
)
def test_b16_options_of_the_other_stage_are_refused(stage, setting, tiny_models, small_corpus, capsys):
    """The prior took a resolution and ignored it."""
    arguments = ["check", stage, f"--data.shards={small_corpus / 'train'}", f"--{setting}"]
    assert main(arguments) == 78
    assert f"applies to the {'decoder' if stage == 'prior' else 'prior'} only" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["full", "lora"])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_b16_gradient_checkpointing_is_applied(stage, variant, tiny_models, small_corpus):
    """It did not exist for the prior and was parsed but left out in both adapter trainers.

    With it, what backward keeps is less, and losses and gradients are the same.
    """

    def trained(is_on):
        config = configuration(
            stage,
            f"model.variant={variant}",
            f"parallel.gradient_checkpointing={is_on}",
            models=tiny_models,
            corpus=small_corpus,
        )
        plan = build.model_plan(config, build.Folders.of(config).source)
        module = plan.build()
        module.load_state_dict(plan.state_dict(), strict=False)
        objective = objective_of(config)
        prepared = objective.prepare(batch_at(loader_of(config), range(4)))
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective.losses(module, prepared).mean()
        num_bytes = sum(kept.values())
        loss.backward()
        gradients = {name: item.grad for name, item in module.named_parameters() if item.requires_grad}
        return loss.detach(), num_bytes, gradients

    (plain_loss, plain_bytes, plain), (loss, num_bytes, gradients) = trained(False), trained(True)
    assert num_bytes < 0.7 * plain_bytes, (num_bytes, plain_bytes)
    torch.testing.assert_close(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def load_pipeline(folder, stage):
    """The network that a stage trains, out of its pipeline."""
    if stage == "prior":
        return KandinskyV22PriorPipeline.from_pretrained(folder).prior
    return KandinskyV22Pipeline.from_pretrained(folder).unet
