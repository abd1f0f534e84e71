"""Time the steps of the package's own training loop, alternating with steps of baselines.

[`training_steps`] runs [`train`] unchanged. After every step, `train` calls the task's `after_step`; there the clock is
stopped and every baseline runs once. The package's step therefore includes everything that `train` does by default
(loading, noise, moving average, checks), while a baseline's step is only its network.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.speed.timing import seconds_of, synchronize
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, TrainingConfig, make_config
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.training.precision import settle_precision


class Paced:
    """A task that stops the clock after every step and then lets others have their turn.

    Args:
        task: the package's.
        turn: called with the number of the step, from 1, and its seconds.
        moments: called with "step", "losses", "backward" when each begins, for those who want to know more.
    """

    def __init__(self, task, turn: Callable[[int, float], None], device: str = "cpu", moments: Callable | None = None):
        self._task, self._turn, self._device, self._moments = task, turn, device, moments or (lambda name: None)
        self._clock = time.perf_counter()

    def __getattr__(self, name):
        return getattr(self._task, name)

    def __setattr__(self, name, value):  # whatever the loop changes about its task, the task must know
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._task, name, value)

    def losses(self, model, batch):
        self._moments("losses")
        losses = self._task.losses(model, batch)
        self._moments("backward")
        return losses

    def after_step(self, step: int) -> dict[str, float]:
        metrics = self._task.after_step(step)
        synchronize(self._device)
        self._turn(step, time.perf_counter() - self._clock)
        self._moments("step")
        self._clock = time.perf_counter()
        return metrics


class Repeated:
    """A few volumes as a dataset so long that no epoch ends while it is measured."""

    def __init__(self, volumes: torch.Tensor, length: int = 4096):
        self.volumes, self.length = volumes, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"volume": self.volumes[index % len(self.volumes)]}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.volumes.shape[2:])] * self.length


def random_volumes(count: int, grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    """(count, 1, *grid) volumes in [0, 1]: noise that is smooth, so that no value is degenerate; speed ignores it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, *(max(2, n // 4) for n in grid), generator=generator)
    volumes = torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
    volumes = volumes + 0.05 * torch.rand(volumes.shape, generator=generator)
    low, high = volumes.amin(dim=(1, 2, 3, 4), keepdim=True), volumes.amax(dim=(1, 2, 3, 4), keepdim=True)
    return (volumes - low) / (high - low)


def training_config(kind: type, steps: int, **options) -> DiffusionConfig | DiscoveryConfig:
    """A config that trains for `steps` without pictures, checkpoints or log lines in between."""
    quiet = {"log_every": 10**6, "checkpoint_every": 10**6, "preview_every": 0, "output_dir": ""}
    return make_config(kind, **{**quiet, "max_steps": steps, **options})


def training_steps(
    make_task: Callable,
    config: TrainingConfig,
    volumes: Repeated,
    baselines: Mapping[str, Callable[[], object]],
    warmup: int,
    device: str = "cpu",
    name: str = "package",
    moments: Callable | None = None,
) -> dict[str, list[float]]:
    """Seconds of every step of the package's training after the warm-up, and of the baselines' turns between them.

    Args:
        make_task: called with the config and the accelerator.
        config: see [`training_config`]; its last step, which saves, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [], **{baseline: [] for baseline in baselines}}

    def turn(step: int, taken: float) -> None:
        if step == config.max_steps:
            return
        others = {baseline: seconds_of(way, device) for baseline, way in baselines.items()}
        if step > warmup:
            for key, value in {name: taken, **others}.items():
                seconds[key].append(value)

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output_dir=str(Path(folder) / "training"))
        config = settle_precision(config, Path(folder) / "none")  # as the command does before anything else
        accelerator = make_accelerator(config)
        task = Paced(make_task(config, accelerator), turn, device, moments)
        train(task, config, volumes, accelerator)
    return seconds
