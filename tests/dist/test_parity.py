"""Every strategy at every world size trains what one process trains: the same keys, the same losses."""

from itertools import product
from pathlib import Path

import pytest
from helpers import forked
from helpers.campaign import cases
from helpers.command import keys, losses, train

pytestmark = pytest.mark.dist

NUM_STEPS = 5
SETTINGS = (
    f"run.max_steps={NUM_STEPS}",
    "data.global_batch_size=16",
    "data.micro_batch_size=2",
    "optim.weight_decay=0.01",
    "objective.snr_gamma=5.0",
)
STRATEGIES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
FAST = {"prior": {(name, 2) for name in STRATEGIES} | {("zero3", 1)}, "decoder": {("fsdp2", 2), ("zero2", 2)}}
"""Stage -> strategies and world sizes of the fast suite; HSDP has four ranks in any case."""
HYBRID = ("parallel.shard_size=2",)
DRAWS = ("objective.noise_draws=3", "parallel.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def one_process(tiny_models, small_corpus, tmp_path_factory):
    """Stage -> the run that all others are held to: a single process, no launcher, no engine."""
    made: dict[str, Path] = {}

    def run(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(stage)
            done = forked.train(
                stage, *SETTINGS, models=tiny_models, corpus=small_corpus, run_dir=made[stage]
            )
            assert done.returncode == 0, done.stderr
            assert len({round(loss, 5) for loss in losses(made[stage])}) == NUM_STEPS, "nothing is compared"
        return made[stage]

    return run


@pytest.mark.parametrize(
    ("stage", "strategy", "world_size"),
    cases(product(FAST, STRATEGIES, (1, 2, 4)), lambda case: case[1:] in FAST[case[0]]),
)
def test_losses_and_keys_are_those_of_one_process(
    stage, strategy, world_size, one_process, tiny_models, small_corpus, tmp_path
):
    reference = one_process(stage)
    done = forked.train(
        stage,
        *SETTINGS,
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
        world_size=world_size,
        strategy=strategy,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    difference = max(abs(a - b) for a, b in zip(losses(tmp_path), losses(reference), strict=True))
    print(f"{stage} {strategy} on {world_size}: largest difference of a loss {difference:.1e}")
    assert difference <= 1e-5
    assert keys(tmp_path) == keys(reference)


@pytest.mark.parametrize("strategy", cases(STRATEGIES, ("zero0", "zero1").__contains__))
def test_a_fresh_process_trains_to_its_exit(strategy, one_process, tiny_models, small_corpus, tmp_path):
    """Of the other strategies test_local.py, test_survival.py and the Slurm tests start fresh processes."""
    done = train(
        "prior", *SETTINGS, models=tiny_models, corpus=small_corpus, run_dir=tmp_path, strategy=strategy
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(one_process("prior")), abs=1e-5)


@pytest.mark.parametrize("stage", cases(["prior", "decoder"], "prior".__eq__))
def test_copies_of_shards_are_one_process_too(stage, one_process, tiny_models, small_corpus, tmp_path):
    reference = one_process(stage)
    done = forked.train(
        stage,
        *SETTINGS,
        *HYBRID,
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
        world_size=4,
        strategy="fsdp2",
    )
    assert done.returncode == 0, done.stderr
    assert max(abs(a - b) for a, b in zip(losses(tmp_path), losses(reference), strict=True)) <= 1e-5
    assert keys(tmp_path) == keys(reference)


@pytest.fixture(scope="module")
def one_process_of_draws(tiny_models, small_corpus, tmp_path_factory):
    """A single process with several noise draws a caption."""
    run_dir = tmp_path_factory.mktemp("draws")
    done = forked.train("prior", *SETTINGS, *DRAWS, models=tiny_models, corpus=small_corpus, run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize("strategy", cases(["ddp", "fsdp2", "zero3"], "fsdp2".__eq__))
def test_several_noise_draws_are_one_process_too(
    strategy, one_process_of_draws, tiny_models, small_corpus, tmp_path
):
    done = forked.train(
        "prior",
        *SETTINGS,
        *DRAWS,
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
        world_size=2,
        strategy=strategy,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert losses(tmp_path) == pytest.approx(losses(one_process_of_draws), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "strategy"),
    cases(
        product(FAST, STRATEGIES),
        [("prior", "fsdp2"), ("prior", "zero0"), ("prior", "zero1"), ("decoder", "ddp")].__contains__,
    ),
)
def test_bf16_follows_fp32(stage, strategy, one_process, tiny_models, small_corpus, tmp_path):
    reference = one_process(stage)
    done = forked.train(
        stage,
        *SETTINGS,
        "parallel.precision=bf16",
        models=tiny_models,
        corpus=small_corpus,
        run_dir=tmp_path,
        world_size=2,
        strategy=strategy,
    )
    assert done.returncode == 0, done.stderr
    # bf16 keeps 8 bits, so a product is off by up to 2**-8; the encoders run in bf16 too.
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=3e-2)
    assert losses(tmp_path) != losses(reference), "it did not run in bf16"
