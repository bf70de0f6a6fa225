"""The trainer: one loop for both stages and every strategy."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from statistics import fmean

from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.config.loader import Resolved
from kandinsky_dist.config.resolve import num_micro, run_dir
from kandinsky_dist.data.dataset import Batch
from kandinsky_dist.errors import DISK_FULL, ConfigError, DiskFullError, StoppedError
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.optim.schedule import learning_rate
from kandinsky_dist.parallel.base import StepOutcome
from kandinsky_dist.parallel.select import engine_precision, select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.disk import write_whole
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.telemetry.meter import Meter
from kandinsky_dist.telemetry.progress import Progress
from kandinsky_dist.telemetry.sinks import AuditLog, Sink, open_sinks
from kandinsky_dist.train import build
from kandinsky_dist.train.cost import flops_per_sample
from kandinsky_dist.train.evaluate import evaluate
from kandinsky_dist.train.step import LossWindow, train_step


class Trainer:
    """A run from its restored checkpoint to its last step. Collective: made and run on every rank."""

    def __init__(self, resolved: Resolved, process: Process, stop: StopRequest) -> None:
        config = self.config = resolved.config
        self.process = process
        self.run_dir = run_dir(config)
        folders = build.Folders.of(config)
        manifest = build.training_manifest(config)
        # All folders are looked at before anything slow is built.
        held_out = build.validation_manifest(config) if config.validation.every_steps else None
        self.num_samples = manifest.num_samples
        self.checkpoints = CheckpointManager(
            self.run_dir,
            process,
            keep=config.checkpoint.keep,
            identity=build.identity(config, folders, manifest),
            config_yaml=resolved.to_yaml(),
        )
        # Judged before the run folder is written to: a refused run leaves the earlier one as it was.
        checkpoint = self.checkpoints.find(config.run.resume, config.run.allow_change)
        agree.decided_by_first(lambda: self.open_run_dir(resolved.to_yaml()))
        precision = engine_precision(config, process.device)
        micro = num_micro(config, world_size=process.world_size)
        self.strategy = select(config, process, num_micro=micro)
        self.model = self.strategy.prepare(build.model_plan(config, folders.source))
        self.objective = build.build_objective(config, folders, process.device, precision)
        self.loader = build.build_loader(config, folders, manifest, process, is_training=True)
        self.validation = None
        if held_out is not None:
            self.validation = build.build_loader(config, folders, held_out, process, is_training=False)
        self.state = self.checkpoints.restore(self.strategy, checkpoint)
        self.losses = LossWindow(self.state.pending_losses)
        self.stop = stop
        self.stop_flag = agree.LaggedFlag()
        self.meter = Meter(
            config.data.global_batch_size,
            flops_per_sample(config, folders, self.objective, process.device) if process.is_first else None,
            process.device,
            process.world_size,
        )
        self.sinks: list[Sink] = (
            open_sinks(self.run_dir, config.telemetry.report_to) if process.is_first else []
        )
        self.waited_before = 0.0
        self.audit = (
            AuditLog(self.run_dir / "audit" / f"rank_{process.rank:05d}.jsonl") if config.data.audit else None
        )

    def run(self) -> None:
        """Trains to `run.max_steps`.

        Raises:
            StoppedError: a stop was requested; the run has saved itself.
        """
        config = self.config
        is_last = self.state.step >= config.run.max_steps
        if is_last:
            say(
                f"step {self.state.step} of {config.run.max_steps} is done: nothing left to train",
                self.process,
            )
        with self.guards(), closing(self.loader.steps(self.state.samples_consumed)) as steps:
            while not is_last:
                microbatches = next(steps)  # on the device, exactly num_micro each
                rate = self.learning_rate()
                loss, outcome = train_step(
                    self.strategy, self.objective, self.model, microbatches, learning_rate=rate
                )
                self.state.advance(config.data.global_batch_size)
                self.losses.add(loss)
                self.meter.tick()
                self.write_audit(microbatches)
                if self.is_due(config.telemetry.log_every_steps) or self.is_due(
                    config.validation.every_steps
                ):
                    self.report(outcome, rate)  # the only place that reads device scalars
                is_last = self.state.step == config.run.max_steps
                is_stopped = self.stop_flag.poll(self.stop.is_made) and not is_last
                if is_stopped or is_last or self.is_due(config.checkpoint.every_steps):
                    self.save()
                if is_stopped:
                    raise StoppedError(
                        f"stopped on request after step {self.state.step} of {config.run.max_steps}, saved "
                        f"in {self.run_dir}: the same command continues"
                    )

    def is_due(self, every_steps: int) -> bool:
        """Whether something that happens every so many steps happens after the current one; 0 is never."""
        return every_steps > 0 and self.state.step % every_steps == 0

    def learning_rate(self) -> float:
        """Rate of the next step."""
        optim = self.config.optim
        return learning_rate(
            self.state.step,
            peak=optim.learning_rate,
            scheduler=optim.lr_scheduler,
            num_warmup_steps=optim.lr_warmup_steps,
            num_steps=self.config.run.max_steps,
        )

    def report(self, outcome: StepOutcome, rate: float) -> None:
        """Validates if that is due, and writes a log entry. Host sync. Collective: call on every rank."""
        entry: dict[str, float | int] = {
            "step": self.state.step,
            "samples_consumed": self.state.samples_consumed,
            "epoch": self.state.samples_consumed / self.num_samples,
            "loss": fmean(self.losses.read()),
            "grad_norm": outcome.grad_norm.item(),
            "learning_rate": rate,
            "skipped": outcome.skipped.item(),
        }
        self.losses.clear()
        waited, self.waited_before = (
            self.loader.data_wait_seconds - self.waited_before,
            self.loader.data_wait_seconds,
        )
        entry |= self.meter.report(waited)
        if self.validation and self.is_due(self.config.validation.every_steps):
            with self.meter.pause():
                entry |= evaluate(
                    self.model, self.objective, self.validation, self.config.validation.num_samples
                )
        for sink in self.sinks:
            sink.write(entry)
        self.progress.update(
            self.state.step, loss=entry["loss"], samples_per_second=entry.get("samples_per_second")
        )

    def save(self) -> None:
        """Writes a checkpoint. Collective: call on every rank."""
        with self.meter.pause():
            self.state.pending_losses = self.losses.read()
            self.checkpoints.save(self.strategy, self.state)

    def write_audit(self, microbatches: Sequence[Batch]) -> None:
        """Writes down which samples this rank's step was made of, where data.audit asks for it."""
        if self.audit:
            self.audit.write(self.state.step, [key for batch in microbatches for key in batch.keys])

    @contextmanager
    def guards(self) -> Iterator[None]:
        """Shows progress, and closes what is open however the run ends."""
        with ExitStack() as stack:
            self.progress = stack.enter_context(
                Progress(self.config.run.max_steps, self.state.step, self.process.is_first)
            )
            for sink in self.sinks:
                stack.callback(sink.close)
            if self.audit:
                stack.callback(self.audit.close)
            yield

    def open_run_dir(self, config_yaml: str) -> None:
        """Makes the run folder and writes the resolved configuration. Rank 0 only."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_whole(self.run_dir / "config.yaml", config_yaml)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise DiskFullError(
                    f"run.dir={self.run_dir}: {error.strerror}; make room and retry"
                ) from error
            raise ConfigError(f"run.dir={self.run_dir} cannot be written: {error.strerror}") from error
