"""Interface of the baseline methods."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch


class Baseline(Protocol):
    """A method that is optionally fitted on a training set and predicts a label map for a volume."""

    name: str
    num_parts: int

    def fit(self, volumes: Sequence[dict]) -> None:
        """Fit on volumes from [`load_volumes`]. Methods that process each volume independently do nothing."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume in [0, 1]; returns (H, W, D) uint8 labels in [0, num_parts)."""
