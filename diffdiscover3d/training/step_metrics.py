"""Non-blocking read-back of step losses."""

import math
from pathlib import Path

import torch

from diffdiscover3d.errors import ModelError

MAX_BAD_STEPS = 5  # consecutive non-finite steps before a training stops with an error


class StepMetrics:
    """Queue of step metrics that are still on the device.

    Reading a value from an accelerator synchronises with all queued work. The metrics of a step are therefore read
    after the next step has been queued, unless they are needed immediately; on a CUDA GPU from a copy in host memory,
    so that only the step itself is waited for and the GPU goes on with the next. On a CPU they are read immediately.

    Args:
        device: device of the training.
        output: output folder of the training, for error messages.

    Attributes:
        latest: metrics of the last step read.
        bad_steps: number of consecutive non-finite steps up to that step.
        stop_requested: whether any process had received a stop request by that step.
    """

    def __init__(self, device: torch.device, output: Path):
        self.latest: dict[str, float] = {}
        self.bad_steps, self.stop_requested = 0, False
        self._lag = 0 if device.type == "cpu" else 1
        self._output = output
        self._waiting: list[tuple[int, tuple[str, ...], torch.Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, names: tuple[str, ...], values: torch.Tensor) -> None:
        """Queue the metrics of a step.

        Args:
            step: step number, from 1.
            names: names of the losses.
            values: (len(names) + 2,) the losses, whether the gradient is finite, and whether a stop was requested, all
                averaged over the processes.
        """
        copied = None
        if values.device.type == "cuda":
            values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._waiting.append((step, names, values, copied))

    def catch_up(self, everything: bool = False) -> None:
        """Read the queued metrics except those of the last step on a GPU; `everything` includes the last step.

        Raises:
            ModelError: after too many consecutive non-finite steps.
        """
        while len(self._waiting) > (0 if everything else self._lag):
            step, names, values, copied = self._waiting.pop(0)
            if copied is not None:
                copied.synchronize()
            *losses, finite, stop = values.tolist()
            self.latest = dict(zip(names, losses, strict=True))
            self.stop_requested |= stop > 0
            is_bad = finite < 1 or not all(map(math.isfinite, losses))
            self.bad_steps = self.bad_steps + 1 if is_bad else 0
            if self.bad_steps >= MAX_BAD_STEPS:
                raise ModelError(
                    f"the loss is not finite since step {step + 1 - self.bad_steps}; the checkpoints in {self._output} "
                    "are from earlier steps. Lower --learning-rate, or use --mixed-precision no."
                )
