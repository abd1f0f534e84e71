"""Interface of the baseline methods."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from diffdiscover3d.baselines.fitting import Schedule, train_network
from diffdiscover3d.models.cpu_kernels import GroupNorm


class Baseline(Protocol):
    """A method that is optionally fitted on a training set and predicts a label map for a volume."""

    name: str
    num_parts: int

    def fit(self, volumes: Sequence[dict]) -> None:
        """Fit on volumes from [`load_volumes`]. Methods that process each volume independently do nothing."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume in [0, 1]; returns (H, W, D) uint8 labels in [0, num_parts)."""


class TrainedBaseline:
    """A baseline with a network that is trained, and with presets of its hyper-parameters.

    Args:
        num_parts: number of parts K.
        preset: "paper" (published hyper-parameters) or "small" (two CPU cores).
        seed: of weights, draws and clusterings.
        device: for the network.
        **overrides: fields of the preset to replace.

    Attributes:
        config: the hyper-parameters.
        training_seconds: of all trainings behind the present networks, those of earlier runs included.

    Raises:
        ValueError: for an unknown preset.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        num_parts: int,
        preset: str = "small",
        seed: int = 0,
        device: str | torch.device = "cpu",
        **overrides,
    ):
        if preset not in self.presets:
            raise ValueError(f"`preset` must be one of {tuple(self.presets)}, got {preset!r}.")
        self.num_parts, self.seed, self.device = num_parts, seed, torch.device(device)
        self.config = dataclasses.replace(self.presets[preset], **overrides)
        self.training_seconds = 0.0

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """Train on volumes.

        Args:
            volumes: items with "volume", (1, H, W, D) float32 in [0, 1]; for methods that are given labels also
                "labels", (H, W, D) int64 with -1 where the label is not given.
            folder: for checkpoints. A training that was interrupted continues from it, and what does not depend on the
                number of parts is shared between baselines of different numbers of parts.
        """
        raise NotImplementedError

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume in [0, 1]; returns (H, W, D) uint8 labels in [0, num_parts)."""
        raise NotImplementedError

    def settings(self) -> dict:
        """The hyper-parameters as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self.config).items()}

    def train(
        self,
        network: nn.Module,
        loss: Callable[[int], torch.Tensor],
        schedule: Schedule,
        folder: Path | None,
        settings: dict | None = None,
    ) -> None:
        """[`train_network`] with the baseline's seed and settings; adds up the seconds."""
        settings = {**self.settings(), **(settings or {})}
        self.training_seconds += train_network(network, loss, schedule, folder, self.seed, settings)

    def place_network(self, network: nn.Module) -> nn.Module:
        """Move a network of 3D convolutions to the device.

        For bfloat16 on a CPU its weights become channels-last, since oneDNN's gradients of convolutions with a few
        channels are faster so.
        """
        network.to(self.device)
        if self.device.type == "cpu" and self.config.bf16:
            GroupNorm.adopt(network).to(memory_format=torch.channels_last_3d)
        return network

    def seeded(self, make: Callable[[], Any]) -> Any:
        """Call `make` with the global random state seeded by the baseline's seed, and restore that state."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return make()


def place(folder: Path | None, name: str) -> Path | None:
    """A folder inside the checkpoint folder, or `None` without one."""
    return None if folder is None else Path(folder) / name
