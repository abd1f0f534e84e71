"""What every rival method looks like."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch


class Baseline(Protocol):
    """Fit on a training set (or nothing), predict a label map for a volume."""

    name: str
    num_parts: int

    def fit(self, volumes: Sequence[dict]) -> None:
        """Learn from volumes as [`load_volumes`] gives them; methods that work on one volume do nothing."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume in [0, 1]: (H, W, D) uint8 in [0, num_parts)."""
