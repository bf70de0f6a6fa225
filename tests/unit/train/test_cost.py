"""FLOPs of a step, against torch's count of a step that is really computed."""

from dataclasses import replace

import pytest
import torch
from helpers.campaign import cases
from helpers.objective import batch_at, configuration, loader_of, objective_of, padded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kandinsky_dist.train import build
from kandinsky_dist.train.cost import step_cost

DRAWS, LORA = "objective.noise_draws=3", "model.variant=lora"


def counted(config, objective, batches):
    """By torch, which adds up the products as they are computed; one batch after another."""
    plan = build.model_plan(config, build.Folders.of(config).source)
    model = plan.build()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            objective.losses(model, objective.prepare(batch)).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "settings", cases(["", DRAWS, LORA, f"{DRAWS} {LORA}"], ["", f"{DRAWS} {LORA}"].__contains__)
)
def test_a_prior_step_costs_what_is_done_at_its_batches_lengths(settings, tiny_models, small_corpus):
    config = configuration("prior", *settings.split(), models=tiny_models, corpus=small_corpus)
    objective, loader = objective_of(config), loader_of(config)
    batches = [padded(batch_at(loader, range(3)), length) for length in (16, 40, 77)]
    batches.append(batch_at(loader, [5]))
    cost = step_cost(config, build.Folders.of(config), objective)
    for batch in batches:
        assert cost([batch]) == counted(config, objective, [batch]), batch.text_length
    assert cost(batches) == sum(cost([batch]) for batch in batches)
    assert cost([batches[0]]) < cost([batches[2]])


def test_a_decoder_step_costs_what_is_done(tiny_models, small_corpus):
    config = configuration("decoder", models=tiny_models, corpus=small_corpus)
    objective, batch = objective_of(config), batch_at(loader_of(config), range(2))
    cost = step_cost(config, build.Folders.of(config), objective)
    assert cost([batch]) == counted(config, objective, [batch])


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_neither_precision_nor_recomputation_is_other_work(stage, tiny_models, small_corpus):
    config = configuration(stage, models=tiny_models, corpus=small_corpus)
    folders, batch = build.Folders.of(config), batch_at(loader_of(config), range(2))
    plain = step_cost(config, folders, objective_of(config))([batch])
    recomputed = replace(config, parallel=replace(config.parallel, gradient_checkpointing=True))
    assert step_cost(recomputed, folders, objective_of(config, torch.bfloat16))([batch]) == plain
