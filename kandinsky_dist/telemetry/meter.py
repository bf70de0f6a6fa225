"""Throughput of training alone: pauses are taken out, the first step is kept apart."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch

from kandinsky_dist.telemetry.devices import peak_tflops


class Meter:
    """Counts optimizer steps against a clock that stands still in pauses.

    The first step after the start holds compilation and first allocations. It is left out of the rates,
    unless a report has no other step to speak of.

    Args:
        samples_per_step: samples of an optimizer step over all ranks, the global batch size.
        device: device of this rank.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        samples_per_step: int,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._samples_per_step = samples_per_step
        self._device = device
        self._clock = clock
        self._peak_tflops = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._paused_seconds = 0.0  # in all finished pauses
        self._pause_start = 0.0
        self._pause_depth = 0
        self._is_warm = False
        self._window_start = self._training_seconds()
        self._warm_start = self._window_start  # where the counted steps of this window begin
        self._num_cold = 0  # steps of this window before `_warm_start`
        self._num_steps = 0  # steps of this window after it
        self._flops = 0.0  # of `_num_steps`, or of `_num_cold` while there are no others

    def tick(self, flops: float | None = None) -> None:
        """Counts one optimizer step. No host sync, but for the first step of the run.

        Args:
            flops: what this rank has done in it; None where unknown.
        """
        if self._is_warm:
            self._flops = (flops or 0.0) + (self._flops if self._num_steps else 0.0)
            self._num_steps += 1
            return
        self._flops = flops or 0.0
        # Without this the first step's work on the device would run on into the steps that are counted.
        self._synchronize()
        self._is_warm = True
        self._num_cold = 1
        self._warm_start = self._training_seconds()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Takes what happens inside (validation, checkpoint, restore) out of every figure. May be nested.

        Waits for the device on both ends: work that was queued before belongs to training, work that was
        queued inside does not.
        """
        if self._pause_depth == 0:
            self._synchronize()
            self._pause_start = self._clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._synchronize()
                self._paused_seconds += self._clock() - self._pause_start

    def report(self, data_wait_seconds: float) -> dict[str, float]:
        """Figures over the steps since the last report. Waits for the device.

        Args:
            data_wait_seconds: how long this rank waited for data since the last report, pauses left out.

        Returns:
            samples_per_second (all ranks), step_seconds, data_wait_fraction (0 to 1; the first step counts),
            tflops_per_second (this rank's; absent where the FLOPs are unknown), mfu (0 to 1, of the published
            dense bf16 peak whatever the run's precision; absent where the device is unknown), peak_memory_gib
            (device memory allocated since the start; on a CPU the process's peak resident memory). Without a
            step since the last report only peak_memory_gib.
        """
        assert self._pause_depth == 0, "a report inside a pause would count the pause"
        self._synchronize()
        now = self._training_seconds()
        figures: dict[str, float] = {}
        if self._num_steps > 0:
            num_steps, seconds = self._num_steps, now - self._warm_start
        else:
            num_steps, seconds = self._num_cold, now - self._window_start
        if num_steps > 0 and seconds > 0:
            figures["samples_per_second"] = num_steps * self._samples_per_step / seconds
            figures["step_seconds"] = seconds / num_steps
            figures["data_wait_fraction"] = min(1.0, data_wait_seconds / (now - self._window_start))
            if self._flops > 0:
                tflops = self._flops / seconds / 1e12
                figures["tflops_per_second"] = tflops
                if self._peak_tflops is not None:
                    figures["mfu"] = tflops / self._peak_tflops
        figures["peak_memory_gib"] = peak_memory_bytes(self._device) / 2**30
        self._window_start = self._warm_start = now
        self._num_cold = self._num_steps = 0
        self._flops = 0.0
        return figures

    def _training_seconds(self) -> float:
        return self._clock() - self._paused_seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most that this process held since its start: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
