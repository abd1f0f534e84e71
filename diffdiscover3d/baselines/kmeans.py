"""k-means on the intensities of each volume."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans


class IntensityKMeans:
    """Lloyd's algorithm on voxel intensities with `restarts` k-means++ initialisations."""

    name = "k-means"

    def __init__(self, num_parts: int, seed: int = 0, restarts: int = 3):
        self.num_parts, self.seed, self.restarts = num_parts, seed, restarts

    def fit(self, volumes: Sequence[dict]) -> None:
        """Does nothing: each volume is clustered independently."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume; returns (H, W, D) uint8 labels."""
        grid = volume.shape[1:]
        clusters = KMeans(self.num_parts, n_init=self.restarts, random_state=self.seed)
        return clusters.fit_predict(volume.reshape(-1, 1).numpy()).reshape(grid).astype(np.uint8)
