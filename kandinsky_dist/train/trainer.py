"""The trainer: one loop for both stages and every strategy."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from statistics import fmean

from torch.profiler import record_function

from kandinsky_dist.checkpoint.manager import CheckpointManager
from kandinsky_dist.config.loader import Resolved
from kandinsky_dist.config.resolve import num_micro, run_dir
from kandinsky_dist.data.batch import BadSample, Batch
from kandinsky_dist.errors import KandinskyError, StoppedError
from kandinsky_dist.faults.divergence import Divergence
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.faults.watchdog import Watchdog
from kandinsky_dist.objectives.base import Prepared
from kandinsky_dist.optim.schedule import learning_rate
from kandinsky_dist.parallel.base import StepOutcome
from kandinsky_dist.parallel.loss_scale import SCALE as LOSS_SCALE
from kandinsky_dist.parallel.select import engine_precision, select
from kandinsky_dist.runtime import agree
from kandinsky_dist.runtime.logs import say
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.telemetry.meter import Meter
from kandinsky_dist.telemetry.profile import Profiler
from kandinsky_dist.telemetry.progress import Progress
from kandinsky_dist.telemetry.sinks import AuditLog, BadSampleLog, Sink, cut_audits, open_sinks
from kandinsky_dist.train import average, build, corpora
from kandinsky_dist.train.cost import step_cost
from kandinsky_dist.train.evaluate import evaluate
from kandinsky_dist.train.feed import Feed, StepData, too_many_bad_samples
from kandinsky_dist.train.out_of_memory import explained_out_of_memory, held_by
from kandinsky_dist.train.rollback import Guard
from kandinsky_dist.train.step import LossWindow, train_step
from kandinsky_dist.train.watch import Watch, open_run_dir


class Trainer:
    """A run from its restored checkpoint to its last step. Collective: made and run on every rank."""

    def __init__(
        self, resolved: Resolved, process: Process, stop: StopRequest, dog: Watchdog | None = None
    ) -> None:
        config = self.config = resolved.config
        self.process = process
        self.run_dir = run_dir(config)
        folders = build.Folders.of(config)
        cache = corpora.cache_description(config, folders)
        order = corpora.training_order(config)
        # All folders are looked at before anything slow is built.
        held_out = corpora.validation_order(config) if config.validation.every_steps else None
        agree.decided_by_first(lambda: corpora.check_corpora(config))
        self.num_samples = order.num_samples if order is not None else None
        if order is None:
            say(corpora.STREAM_NOTICE, process)
        fence = Fence(self.run_dir)
        self.checkpoints = CheckpointManager(
            self.run_dir,
            process,
            keep=config.checkpoint.keep,
            identity=build.identity(config, folders) | corpora.identity(config, order),
            config_yaml=resolved.to_yaml(),
            is_async=config.checkpoint.async_save,
            fence=fence,
            on_failure=stop.make,  # all ranks stop at one step, and there `finish` says why
        )
        # Judged before the run folder is written to: a refused run leaves the earlier one as it was.
        micro = num_micro(config, world_size=process.world_size)
        precision = engine_precision(config, process.device)
        build.prepare_kernels(config, process.device, precision)
        self.strategy = select(config, process, num_micro=micro)
        plan = build.model_plan(config, folders.source)
        checkpoint = self.checkpoints.find(config.run.resume, config.run.allow_change)
        owner = agree.decided_by_first(
            lambda: open_run_dir(self.run_dir, resolved.to_yaml(), fence, process.world_size)
        )
        self.watch = Watch(
            config, self.run_dir, fence, owner, self.checkpoints, process, stop, dog or Watchdog()
        )
        self.model = self.strategy.prepare(plan)
        self.objective = build.build_objective(config, folders, process.device, precision, cache)
        self.loader = corpora.build_loader(config, folders.prior, order, process, is_training=True)
        self.validation = None
        if held_out is not None:
            self.validation = corpora.build_loader(
                config, folders.prior, held_out, process, is_training=False
            )
        self.watch.enter("restore")
        self.state = self.checkpoints.restore(self.strategy, checkpoint, plan)
        self.ema = average.restored(self.strategy, checkpoint, process)
        self.guard = Guard(config.guard, self.run_dir, self.checkpoints, plan, process)
        self.saved_step = self.watch.step = self.state.step
        self.losses = self.pending_losses()
        self.feed = Feed(self.loader.steps(self.state.samples_consumed), self.prepare, stop, process.device)
        self.cost = step_cost(config, folders, self.objective, cache) if process.is_first else None
        self.meter = Meter(config.data.global_batch_size, process.device)
        self.profiler = Profiler(config.telemetry, self.run_dir / "profile", process, self.meter.pause)
        self.sinks: list[Sink] = (
            open_sinks(self.run_dir, config.telemetry.report_to) if process.is_first else []
        )
        self.bad_samples = BadSampleLog(self.run_dir / "bad_samples.jsonl") if process.is_first else None
        self.waited_before = 0.0
        audits = self.run_dir / "audit"
        if process.is_first:
            cut_audits(audits, process.world_size, self.state.step)
        self.audit = AuditLog(audits / f"rank_{process.rank:05d}.jsonl") if config.data.audit else None

    def run(self) -> None:
        """Trains to `run.max_steps`.

        Raises:
            StoppedError: a stop was requested; the run has saved itself.
        """
        config = self.config
        if self.state.step >= config.run.max_steps:
            say(
                f"step {self.state.step} of {config.run.max_steps} is done: nothing left to train",
                self.process,
            )
        with self.guards():
            while self.state.step < config.run.max_steps:
                data = self.next_step_data()  # on the device, exactly num_micro micro-batches
                rate = self.learning_rate()
                self.watch.enter("compute")
                is_last = self.state.step + 1 == config.run.max_steps
                with self.profiler.step(self.state.step + 1):
                    loss, outcome = train_step(
                        self.strategy,
                        self.objective,
                        self.model,
                        data.prepared,
                        learning_rate=rate,
                        watch=self.watch,
                        beside=None if is_last else self.look_ahead,
                    )
                    with record_function("ema"):
                        self.ema.update(outcome.skipped)
                self.state.advance(config.data.global_batch_size)
                self.losses.add(loss, outcome)
                self.meter.tick(self.cost(data.microbatches) if self.cost else None)
                self.watch.stepped(self.state.step)
                self.write_audit(data.microbatches)
                if self.is_due(config.telemetry.log_every_steps) or self.is_due(
                    config.validation.every_steps
                ):
                    divergence = self.report(outcome, rate)  # the only place that reads device scalars
                    if divergence:
                        self.go_back(divergence)
                        continue
                if is_last or self.is_due(config.checkpoint.every_steps):
                    self.save()
            self.watch.enter("save")
            self.checkpoints.finish()
            self.watch.enter("leave")

    def next_step_data(self) -> StepData:
        """The data of the next step; saves the run first where it must stop. Collective: call on every rank.

        Raises:
            StoppedError: a stop was requested.
            DataError: a rank has no data, or too many samples were damaged.
        """
        self.watch.enter("data")
        data = self.feed.take()
        error: KandinskyError | None = data.failure
        if error is None and data.is_stopped:
            error = StoppedError(
                f"stopped on request after step {self.state.step} of {self.config.run.max_steps}, saved "
                f"in {self.run_dir}: the same command continues"
            )
        self.write_bad_samples(data.bad_samples)
        error = error or too_many_bad_samples(data.bad_samples, self.state, self.config.data, self.run_dir)
        if error is not None:
            if self.state.step > self.saved_step:
                self.save()
            self.checkpoints.finish()
            raise error
        self.state.num_bad_samples += len(data.bad_samples)
        return data

    def prepare(self, batch: Batch) -> Prepared:
        """Runs the frozen encoders on a micro-batch, in this rank's own time."""
        with self.watch.alone():
            return self.objective.prepare(batch)

    def look_ahead(self) -> None:
        """Fetches and encodes the next step's data while the device computes. Collective, nobody waits."""
        self.watch.enter("data")
        self.feed.look_ahead()

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

    def report(self, outcome: StepOutcome, rate: float) -> Divergence | None:
        """Judges the steps since the last log entry, validates if that is due, and writes an entry.

        Host sync. Collective: call on every rank.
        """
        self.watch.enter("report")
        losses, skipped, rescaled = self.losses.read()
        divergence = self.guard.judge(self.state, losses, skipped, rescaled)
        entry: dict[str, float | int] = {
            "step": self.state.step,
            "samples_consumed": self.state.samples_consumed,
            "loss": fmean(losses),
            "grad_norm": outcome.grad_norm.item(),
            "learning_rate": rate,
            "skipped": sum(skipped),
            "rollbacks": self.state.num_rollbacks,
        }
        scale = self.strategy.engine_state().get(LOSS_SCALE)
        if scale is not None:
            entry["loss_scale"] = scale
        self.losses.clear()
        waited, self.waited_before = (
            self.loader.data_wait_seconds - self.waited_before,
            self.loader.data_wait_seconds,
        )
        entry |= self.meter.report(waited)
        entry |= self.watch.report(waited, entry.get("step_seconds", 0.0) * len(losses))
        if self.validation and self.is_due(self.config.validation.every_steps):
            self.watch.enter("validate")
            with self.meter.pause():
                entry |= average.with_average(self.ema, self.strategy, self.evaluate)
        if self.num_samples is not None:
            entry["epoch"] = self.state.samples_consumed / self.num_samples
        entry["bad_samples"] = self.state.num_bad_samples
        agree.decided_by_first(lambda: self.write(entry))
        self.progress.update(
            self.state.step, loss=entry["loss"], samples_per_second=entry.get("samples_per_second")
        )
        return divergence

    def write(self, entry: dict[str, float | int]) -> None:
        """Writes an entry, unless another start has the run folder by now. Rank 0 only."""
        self.watch.check_owner()
        for sink in self.sinks:
            sink.write(entry)

    def go_back(self, divergence: Divergence) -> None:
        """Returns to the weights from before a divergence. Collective: call on every rank."""
        self.watch.enter("go back")
        with self.meter.pause():
            self.state, checkpoint = self.guard.go_back(self.strategy, self.state, divergence)
            self.ema = average.restored(self.strategy, checkpoint, self.process)
        self.saved_step = self.watch.step = self.state.step
        self.losses = self.pending_losses()

    def pending_losses(self) -> LossWindow:
        """The steps that the restored run had not logged yet."""
        state = self.state
        return LossWindow(state.pending_losses, state.pending_skipped, state.pending_rescaled)

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of the weights as they are. Collective: call on every rank."""
        assert self.validation is not None
        return evaluate(self.model, self.objective, self.validation, self.config.validation.num_samples)

    def save(self) -> None:
        """Saves the run, beside training where that is asked for. Collective: call on every rank."""
        self.watch.enter("save")
        self.watch.check_save(self.saved_step)
        with self.meter.pause():
            losses, skipped, rescaled = self.losses.read()
            self.state.pending_losses = losses
            self.state.pending_skipped, self.state.pending_rescaled = skipped, rescaled
            self.state.engine = self.strategy.engine_state()
            self.state.num_averaged = self.ema.num_updates()
            self.checkpoints.save(self.strategy, self.state, self.ema.tensors())
        self.saved_step = self.state.step

    def write_bad_samples(self, found: Sequence[BadSample]) -> None:
        """Writes down the damaged samples of the next step. Rank 0 does."""
        if self.bad_samples:
            for bad in found:
                self.bad_samples.write(self.state.step + 1, asdict(bad))

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
            for log in (self.audit, self.bad_samples):
                if log:
                    stack.callback(log.close)
            stack.callback(self.profiler.close)
            stack.callback(self.feed.close)
            stack.callback(self.checkpoints.close)
            held = partial(held_by, self.strategy, self.model, self.objective, self.ema)
            stack.enter_context(explained_out_of_memory(self.config, self.process, held))
            yield
