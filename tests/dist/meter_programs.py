"""What the runs whose meter is tested do beside training."""

import json

import torch
from torch import nn
from torch.nn import functional

from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train import trainer as trainer_module

STEP_SECONDS, PAUSE_SECONDS = 0.5, 1000.0


def run_on_a_clock(stage, settings):
    """A trainer whose clock moves in steps, and much more in what should be pauses."""
    now = 0.0
    step, evaluate, meter = trainer_module.train_step, trainer_module.evaluate, trainer_module.Meter

    def took(seconds, call):
        def wrapped(*args, **kwargs):
            nonlocal now
            result = call(*args, **kwargs)
            now += seconds
            return result

        return wrapped

    trainer_module.train_step = took(STEP_SECONDS, step)
    trainer_module.evaluate = took(PAUSE_SECONDS, evaluate)
    trainer_module.Meter = lambda *args, **kwargs: meter(*args, **kwargs, clock=lambda: now)
    with joined() as process:
        run = trainer_module.Trainer(
            loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest()
        )
        run.checkpoints.save = took(PAUSE_SECONDS, run.checkpoints.save)
        run.run()


def counted_run(stage, settings, out):
    """Trains, and adds up FLOPs by what real layers really get; no counter of torch or of ours takes part."""
    total = {"trained": 0, "frozen": 0}
    attend = functional.scaled_dot_product_attention

    def count(key):
        def hook(layer, args, output):
            if isinstance(layer, nn.Linear):
                total[key] += 2 * output.numel() * layer.in_features
            else:
                window = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
                total[key] += 2 * output.numel() * window

        return hook

    def watched(module, key):
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(count(key))

    def attention(query, keys, values, *args, **kwargs):
        key = "trained" if torch.is_grad_enabled() else "frozen"
        num_queries, num_keys = query.shape[-2], keys.shape[-2]
        pairs = query.shape[:-2].numel() * num_queries * num_keys
        total[key] += 2 * pairs * (query.shape[-1] + values.shape[-1])
        return attend(query, keys, values, *args, **kwargs)

    functional.scaled_dot_product_attention = attention
    with joined() as process:
        run = trainer_module.Trainer(
            loader.load(stage, None, [loader.Layer("test", settings)]), process, StopRequest()
        )
        watched(run.model, "trained")
        for name in ("text_encoder", "image_encoder", "movq"):
            if getattr(run.objective, name, None) is not None:
                watched(getattr(run.objective, name), "frozen")
        total.update(trained=0, frozen=0)  # building looked at a black picture
        run.run()
    out.write_text(json.dumps(total))
