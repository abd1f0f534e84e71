"""k-means on the diffusion features of each volume."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline


class FeaturesKMeans:
    """Mini-batch k-means on diffusion features upsampled to the voxel grid.

    With several decoder stages, the features of each are scaled to unit total variance, so that stages with many
    channels do not dominate.

    Args:
        num_parts: number of clusters.
        teacher: the pretrained diffusion model.
        stages: decoder stages; 1 is the coarsest.
        timestep: timestep t of the noise.
        num_noise: number of noise samples over which the features are averaged.
        seed: random seed of the noise and of k-means.
    """

    def __init__(
        self,
        num_parts: int,
        teacher: DiffusionFeaturePipeline,
        stages: Sequence[int],
        timestep: int = 25,
        num_noise: int = 4,
        seed: int = 0,
    ):
        self.name = f"features k-means, stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"
        self.num_parts, self.teacher, self.stages = num_parts, teacher, tuple(stages)
        self.timestep, self.num_noise, self.seed = timestep, num_noise, seed

    def fit(self, volumes: Sequence[dict]) -> None:
        """Does nothing: each volume is clustered independently."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume; returns (H, W, D) uint8 labels."""
        generator = torch.Generator().manual_seed(self.seed)
        found = self.teacher(volume[None], self.timestep, self.stages, generator, self.num_noise, upsample=True)
        features = [f[0].flatten(1).T.numpy() for f in found.features]  # (voxels, channels) each
        joined = features[0] if len(features) == 1 else join_equally(features)
        clusters = MiniBatchKMeans(self.num_parts, n_init=3, batch_size=4096, random_state=self.seed)
        return clusters.fit_predict(joined).reshape(volume.shape[1:]).astype(np.uint8)


def join_equally(features: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate (voxels, channels) features, each scaled to a total variance of 1."""
    return np.concatenate([f / np.sqrt(f.var(axis=0).sum() + 1e-12) for f in features], axis=1)
