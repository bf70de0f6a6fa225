"""A case of `bench train` that trains in the incumbent's way, on accelerate as its users do."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from kandinsky_dist.bench.incumbent import (
    Networks,
    flops_per_sample,
    mean_squared_error,
    networks,
    random_draws,
)
from kandinsky_dist.bench.incumbent_data import Collate, Samples
from kandinsky_dist.bench.parts import Parts
from kandinsky_dist.bench.teams import OverError, Turns
from kandinsky_dist.bench.train_case import Case
from kandinsky_dist.bench.train_ours import synchronized_clock
from kandinsky_dist.config.resolve import num_micro
from kandinsky_dist.config.schema import Config
from kandinsky_dist.objectives.base import TRAINING_DRAW
from kandinsky_dist.parallel.select import engine_precision
from kandinsky_dist.telemetry.devices import peak_tflops
from kandinsky_dist.telemetry.meter import peak_memory_bytes

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run(case: Case, turns: Turns, folder: Path) -> None:
    """Trains whenever it is this case's turn. For `Team`."""
    training = Training(case.config, turns)
    turns.ready(
        synchronized_clock(training.device),
        precision=str(training.dtype).removeprefix("torch."),
        threads_per_rank=torch.get_num_threads(),
    )
    with contextlib.suppress(OverError):
        training.run()


class Training:
    """Networks, optimizer and data in accelerate's hands."""

    def __init__(self, config: Config, turns: Turns) -> None:
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler

        self.config = config
        self._turns = turns
        on_cpu = not torch.cuda.is_available()
        self.dtype = engine_precision(config, torch.device("cpu" if on_cpu else "cuda"))
        self._accelerator = accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=MIXED_PRECISION[self.dtype],
            gradient_accumulation_steps=1,  # known when the number of ranks is
        )
        world_size = accelerator.num_processes
        self._num_micro = num_micro(config, world_size=world_size)
        accelerator.gradient_accumulation_steps = self._num_micro
        self.device = torch.device(accelerator.device)
        self._networks: Networks = networks(config, self.dtype, self.device)
        samples, collate = Samples(config), Collate(config)
        batches = DataLoader(
            samples,
            sampler=SequentialSampler(samples),
            batch_size=config.data.micro_batch_size,
            collate_fn=collate,
            num_workers=0,
        )
        self._flops_per_sample = flops_per_sample(self._networks, collate([samples[0]]))
        optim = config.optim
        optimizer = torch.optim.AdamW(
            self._networks.trained.parameters(),
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
            foreach=True,
        )
        schedule = get_scheduler("constant", optimizer=optimizer)
        self._networks.trained, self._optimizer, self._batches, self._schedule = accelerator.prepare(
            self._networks.trained, optimizer, batches, schedule
        )
        self._draws = self._shared_draws()
        self._parts = Parts(self.device)
        turns.on_begin, turns.on_end = self._begin, self._figures

    def run(self) -> None:
        """Trains for as long as there are turns."""
        iterator = iter(self._batches)
        while True:
            self._turns.step_begins()
            loss_sum = torch.zeros((), device=self.device)
            for _ in range(self._num_micro):
                with self._parts.timed("data"):
                    batch = next(iterator)
                loss_sum += self._micro_step(batch)
            if self._turns.first_loss is None:
                self._turns.first_loss = loss_sum / self._num_micro
                self._draws = random_draws

    def _micro_step(self, batch: dict[str, Tensor]) -> Tensor:
        accelerator, trained = self._accelerator, self._networks.trained
        with accelerator.accumulate(trained):
            with self._parts.timed("encoders"):
                noised = self._networks.encode(batch, self._draws)
            with self._parts.timed("forward"):
                loss = mean_squared_error(self._networks.predict(noised), noised.target)
            # The mean over ranks, for a log entry of the step; and below this rank's own, for the bar.
            gathered = accelerator.gather(loss.detach().repeat(len(batch["positions_B"]))).mean().item()
            with self._parts.timed("backward"):
                accelerator.backward(loss)
            with self._parts.timed("optimizer"):
                if accelerator.sync_gradients and self.config.optim.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(trained.parameters(), self.config.optim.max_grad_norm)
                self._optimizer.step()
                self._schedule.step()
                self._optimizer.zero_grad()
        self.said = {"train_loss": gathered, "step_loss": loss.item()}
        return loss.detach()

    def _begin(self) -> None:
        self._parts.read()

    def _figures(self, step_seconds: float) -> dict[str, Any]:
        samples = self.config.data.global_batch_size / self._accelerator.num_processes
        tflops = samples * self._flops_per_sample / step_seconds / 1e12
        found: dict[str, Any] = {
            "parts": self._parts.read(),
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            "tflops_per_second": tflops,
            "gflop_per_sample": self._flops_per_sample / 1e9,
        }
        if self.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
            return found | {"mfu": None if peak is None else tflops / peak}
        return found

    def _shared_draws(self) -> Any:
        """Noise and timesteps of the first step: those that a position has in this project's own training.

        With the same weights on the same samples its loss is then the same, and says so in the record.
        """
        seed = self.config.run.seed

        def draws(clean: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
            noise = TRAINING_DRAW.noise(seed, positions_B, tuple(clean.shape[1:]))
            return noise.to(clean.dtype), TRAINING_DRAW.timesteps(seed, positions_B, 1000)

        return draws
