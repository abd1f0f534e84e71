"""The losses of the steps, read from the device without making it wait."""

import math
from pathlib import Path

import torch

from diffdiscover3d.errors import ModelError

MAX_BAD_STEPS = 5  # steps in a row whose gradient is not finite before a training gives up


class StepFigures:
    """Figures of steps on their way from the device.

    Reading a number from a GPU waits for all the work that was given to it. The figures of a step are therefore read
    when the device has the next step to work on, unless they are wanted at once. A CPU has nothing to wait for.

    Args:
        device: on which the steps are taken.
        output: folder of the training, for the text of the error.

    Attributes:
        latest: figures of the last step that was read.
        bad_steps: how many steps in a row, up to that one, were not finite.
        stop_asked: whether any process had been asked to stop by then.
    """

    def __init__(self, device: torch.device, output: Path):
        self.latest: dict[str, float] = {}
        self.bad_steps, self.stop_asked = 0, False
        self._lag = 0 if device.type == "cpu" else 1
        self._output = output
        self._waiting: list[tuple[int, tuple[str, ...], torch.Tensor]] = []

    def add(self, step: int, names: tuple[str, ...], values: torch.Tensor) -> None:
        """Take the figures of a step.

        Args:
            step: its number, from 1.
            names: of the losses.
            values: (len(names) + 2,) the losses, then whether the gradient was finite and whether a process was asked
                to stop, all means over the processes.
        """
        self._waiting.append((step, names, values))

    def catch_up(self, everything: bool = False) -> None:
        """Read what the device has finished by now; `everything` waits for the last step too.

        Raises:
            ModelError: if too many steps in a row were not finite.
        """
        while len(self._waiting) > (0 if everything else self._lag):
            step, names, values = self._waiting.pop(0)
            *losses, finite, stop = values.tolist()
            self.latest = dict(zip(names, losses, strict=True))
            self.stop_asked |= stop > 0
            is_bad = finite < 1 or not all(map(math.isfinite, losses))
            self.bad_steps = self.bad_steps + 1 if is_bad else 0
            if self.bad_steps >= MAX_BAD_STEPS:
                raise ModelError(
                    f"the loss is not finite since step {step + 1 - self.bad_steps}; the checkpoints in {self._output} "
                    "are from before. Lower --learning-rate, or use --mixed-precision no."
                )
