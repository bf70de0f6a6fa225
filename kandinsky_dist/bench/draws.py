"""`bench draws`: what several noise draws a caption do to the gradient's variance, and what they cost.

No clock is read: variances of gradients, each of one caption, and FLOPs. Both are the same on any machine.

Letters of shapes: P values of a gradient.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor, nn

from kandinsky_dist.bench.draws_report import to_markdown
from kandinsky_dist.bench.record import Record, device_name
from kandinsky_dist.bench.workload import build, workload
from kandinsky_dist.config.schema import Config, DataConfig, ModelConfig, OptimConfig
from kandinsky_dist.data.packing.corpus import build_demo
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.architectures import Size, architecture
from kandinsky_dist.models.init import initialise
from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.objectives.prior import PriorObjective
from kandinsky_dist.optim.adamw import build_adamw, set_learning_rate
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.telemetry.flops import count_flops
from kandinsky_dist.train import corpora
from kandinsky_dist.train.build import Folders, build_objective, model_plan

NOISE_DRAWS = (1, 2, 4, 8)
NUM_GROUPS = 8
"""Parts of the captions whose figures are compared for their spread."""
CAPTION_TOKENS = 24
"""Text length for which full-size networks are counted: captions of a sentence, padded."""
CPU = torch.device("cpu")


def run(
    out: Path, *, shards: str | None, models: Path | None, stages: Sequence[int], num_captions: int
) -> None:
    """Measures a tiny prior in the course of its training; writes OUT/draws.json and draws.md, prints that.

    Args:
        out: created.
        shards: corpus with a manifest; None makes the demo corpus.
        models: folder with prior/; None makes tiny networks with random weights.
        stages: optimizer steps, of 32 captions, after which gradients are looked at.
        num_captions: whose gradients are looked at each time, one by one.
    """
    if num_captions < 2 * NUM_GROUPS:
        raise ConfigError(f"--captions={num_captions} must be {2 * NUM_GROUPS} or more")
    out.mkdir(parents=True, exist_ok=True)
    given = f"{' --shards SHARDS' if shards else ''}{' --models MODELS' if models else ''}"
    with _places(shards, models) as (corpus, networks):
        rows = measure(corpus, networks, stages=sorted(stages), num_captions=num_captions)
    steps = " ".join(str(stage) for stage in stages)
    record = Record.now(
        "draws",
        device=device_name("cpu"),
        command=f"kandinsky-dist bench draws OUT{given} --steps {steps} --captions {num_captions}",
        setting={"num_captions": num_captions, "full_text_tokens": CAPTION_TOKENS},
        rows=rows,
    )
    record.save(out / "draws.json")
    (out / "draws.md").write_text(to_markdown(record), "utf-8")
    print(to_markdown(record), end="")


@contextmanager
def _places(shards: str | None, models: Path | None) -> Iterator[tuple[str, Path]]:
    """Corpus and networks; those that are made here are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="draws_") as scratch:
        if shards is None:
            build_demo(Path(scratch, "corpus"))
            shards = str(Path(scratch, "corpus", "train"))
        if models is None:
            models = Path(scratch, "models")
            initialise("tiny", models)
        yield shards, models


def measure(shards: str, models: Path, *, stages: Sequence[int], num_captions: int) -> list[dict[str, float]]:
    """A row for each stage of training and number of draws."""
    config = Config(
        stage="prior",
        model=ModelConfig(prior=str(models / "prior")),
        data=DataConfig(shards=shards, global_batch_size=32, micro_batch_size=32, num_workers=0),
        optim=OptimConfig(learning_rate=1e-3),
    )
    folders = Folders.of(config)
    objective = build_objective(config, folders, CPU, torch.float32)
    assert isinstance(objective, PriorObjective)
    model = _initial(config, folders)
    trained = [item for item in model.named_parameters() if item[1].requires_grad]
    optimizer = build_adamw(trained, config.optim)
    set_learning_rate(optimizer, config.optim.learning_rate)
    process = Process(rank=0, local_rank=0, world_size=1, device=CPU)
    order = corpora.training_order(config)
    steps = corpora.build_loader(config, folders.prior, order, process, is_training=True).steps(0)
    prepared = (objective.prepare(batch) for microbatches in steps for batch in microbatches)
    full = {draws: prior_flops("full", CAPTION_TOKENS, draws) for draws in NOISE_DRAWS}
    encoders = encoder_flops("full", CAPTION_TOKENS)
    num_done, rows = 0, list[dict[str, float]]()
    for stage in stages:
        for _ in range(stage - num_done):
            objective.losses(model, next(prepared)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        num_done = stage
        captions = _one_by_one(prepared, num_captions)
        length = max(item.conditions["attention_mask"].shape[1] for item in captions)
        parts = [captions[number::NUM_GROUPS] for number in range(NUM_GROUPS)]
        groups = [_moments(model, objective, part) for part in parts]
        for draws in NOISE_DRAWS:
            whole = sum((group[draws] for group in groups), _Moments())
            ratios = [group[draws].variance / group[1].variance for group in groups]
            rows.append(
                {
                    "num_steps": stage,
                    "noise_draws": draws,
                    "loss": whole.losses / whole.count,
                    "variance": whole.variance,
                    "shared_variance": whole.shared_variance,
                    "squared_mean": whole.squared_mean,
                    "ratio_standard_error": stdev(ratios) / NUM_GROUPS**0.5,
                    "text_tokens": length,
                    "tiny_cached_flops": prior_flops("tiny", length, draws),
                    "full_cached_flops": full[draws],
                    "full_live_flops": full[draws] + encoders,
                }
            )
    return rows


def _initial(config: Config, folders: Folders) -> nn.Module:
    plan = model_plan(config, folders.source)
    model = plan.build()
    model.load_state_dict(plan.state_dict())
    return model


def _one_by_one(prepared: Iterator[Prepared], num_captions: int) -> list[Prepared]:
    """Captions that the network has not seen yet, while the corpus lasts."""
    found: list[Prepared] = []
    while len(found) < num_captions:
        whole = next(prepared)
        for row in range(len(whole.clean)):
            part = slice(row, row + 1)
            conditions = {name: value[part] for name, value in whole.conditions.items()}
            found.append(Prepared(whole.positions_B[part], whole.clean[part], conditions))
    return found[:num_captions]


@dataclass
class _Moments:
    """Sums over the gradients of some captions' losses, each with one noise and again with another."""

    count: int = 0
    losses: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    sum_P: Tensor | float = 0.0

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.count + other.count,
            self.losses + other.losses,
            self.squares + other.squares,
            self.products + other.products,
            self.sum_P + other.sum_P,
        )

    @property
    def variance(self) -> float:
        """The mean square of a gradient's distance from the mean gradient."""
        return (self.squares - self._squared_sum / self.count) / (self.count - 1)

    @property
    def shared_variance(self) -> float:
        """What of it does not depend on the noise: the covariance of a caption's two gradients."""
        return self.products / self.count - self.squared_mean

    @property
    def squared_mean(self) -> float:
        """Of the mean gradient, without what variance adds to it."""
        return self._squared_sum / self.count**2 - self.variance / self.count

    @property
    def _squared_sum(self) -> float:
        assert isinstance(self.sum_P, Tensor)
        return float(self.sum_P.square().sum())


def _moments(
    model: nn.Module, objective: PriorObjective, captions: Sequence[Prepared]
) -> dict[int, _Moments]:
    """By number of draws; the second noise is drawn for one draw only."""
    found = {draws: _Moments() for draws in NOISE_DRAWS}
    for caption in captions:
        _, again_P = _gradient(model, replace(objective, seed=objective.seed + 1), caption)
        for draws in NOISE_DRAWS:
            loss, gradient_P = _gradient(model, replace(objective, noise_draws=draws), caption)
            square, product = float(gradient_P.square().sum()), float(gradient_P @ again_P)
            found[draws] += _Moments(1, loss, square, product, gradient_P)
    return found


def _gradient(model: nn.Module, objective: PriorObjective, caption: Prepared) -> tuple[float, Tensor]:
    """A caption's loss and its gradient."""
    parameters = [item for item in model.parameters() if item.requires_grad]
    loss = objective.losses(model, caption).sum()
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def prior_flops(size: Size, num_text_tokens: int, noise_draws: int) -> float:
    """FLOPs of one caption's forward and backward through the prior."""
    process = Process(rank=0, local_rank=0, world_size=1, device=torch.device("meta"))

    def step() -> None:
        objective, prepared = workload("prior", size, process)
        assert isinstance(objective, PriorObjective)
        texts = ("encoder_hidden_states", "attention_mask")
        conditions = {
            name: value[:, :num_text_tokens] if name in texts else value
            for name, value in prepared.conditions.items()
        }
        objective = replace(objective, noise_draws=noise_draws)
        objective.losses(build("prior", size), replace(prepared, conditions=conditions))

    return count_flops(step)


def encoder_flops(size: Size, num_text_tokens: int) -> float:
    """FLOPs of the frozen encoders for one caption and image."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    shapes = architecture(size)

    def encode() -> None:
        text = CLIPTextModelWithProjection(CLIPTextConfig(**shapes.text_encoder))
        text(torch.zeros(1, num_text_tokens, dtype=torch.int64))
        image = CLIPVisionModelWithProjection(CLIPVisionConfig(**shapes.image_encoder))
        image(torch.zeros(1, 3, shapes.image_size, shapes.image_size))

    with torch.no_grad():
        return count_flops(encode)
