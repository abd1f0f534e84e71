"""k-means on a diffusion model's prediction of the clean volume."""

from collections.abc import Sequence

import numpy as np
import torch

from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline


class DenoisedKMeans:
    """[`IntensityKMeans`] on the diffusion model's prediction of the clean volume.

    Args:
        num_parts: number of clusters.
        seed: random seed of the noise and of k-means.
        teacher: the pretrained diffusion model.
        timestep: timestep t of the noise.
        num_noise: number of noise samples over which the prediction is averaged.
    """

    name = "k-means on the clean prediction"

    def __init__(
        self,
        num_parts: int,
        teacher: DiffusionFeaturePipeline,
        timestep: int = 60,
        num_noise: int = 4,
        seed: int = 0,
    ):
        self.num_parts, self.teacher, self.seed = num_parts, teacher, seed
        self.timestep, self.num_noise = timestep, num_noise
        self.kmeans = IntensityKMeans(num_parts, seed)

    def fit(self, volumes: Sequence[dict]) -> None:
        """Does nothing: each volume is clustered independently."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume; returns (H, W, D) uint8 labels."""
        generator = torch.Generator().manual_seed(self.seed)
        found = self.teacher(volume[None], self.timestep, (), generator, self.num_noise, denoised=True)
        return self.kmeans.predict(found.denoised[0].cpu())
