"""k-means on a volume's diffusion features."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline


class FeaturesKMeans:
    """Mini-batch k-means on the features of one decoder stage, brought to the voxels.

    Args:
        num_parts: number of clusters.
        teacher: the pretrained diffusion model.
        stage: decoder stage, 1 is the coarsest.
        timestep: noise step t.
        num_noise: noise draws over which the features are averaged.
        seed: of the noise and of the clustering.
    """

    def __init__(
        self,
        num_parts: int,
        teacher: DiffusionFeaturePipeline,
        stage: int,
        timestep: int = 25,
        num_noise: int = 4,
        seed: int = 0,
    ):
        self.name = f"features k-means, stage {stage}"
        self.num_parts, self.teacher, self.stage = num_parts, teacher, stage
        self.timestep, self.num_noise, self.seed = timestep, num_noise, seed

    def fit(self, volumes: Sequence[dict]) -> None:
        """Nothing to learn: each volume is clustered for itself."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        generator = torch.Generator().manual_seed(self.seed)
        found = self.teacher(volume[None], self.timestep, (self.stage,), generator, self.num_noise, upsample=True)
        features = found.features[0][0].flatten(1).T.numpy()  # (voxels, channels)
        clusters = MiniBatchKMeans(self.num_parts, n_init=3, batch_size=4096, random_state=self.seed)
        return clusters.fit_predict(features).reshape(volume.shape[1:]).astype(np.uint8)
