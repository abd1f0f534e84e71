"""Clusters in space of a diffusion model's prediction of the clean volume: the assignments without any training."""

from collections.abc import Sequence

import numpy as np
import torch

from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.nesting import share_parts
from diffdiscover3d.training.spatial_split import clean_pieces, divide_structure


class SpatialKMeans:
    """Divide a volume by [`IntensityKMeans`] on the clean prediction, then its parts by [`divide_structure`].

    Two parts are found first and cleaned to one piece each. Of these the one with the larger variance is divided, then
    the smaller parts, until there are `num_parts`, as the nested networks do it.

    Args:
        num_parts: 2, or twice or four times as many.
        teacher: the pretrained diffusion model.
        timesteps: noise steps of the clean prediction, which is their mean.
        num_noise: noise draws for each of them.
        seed: of the clustering and the noise.

    Raises:
        ValueError: for another number of parts.
    """

    name = "k-means in space"

    def __init__(
        self,
        num_parts: int,
        teacher: DiffusionFeaturePipeline,
        timesteps: Sequence[int] = (25, 60, 100),
        num_noise: int = 2,
        seed: int = 0,
    ):
        if num_parts not in (2, 4, 8):
            raise ValueError(f"`num_parts` must be 2, 4 or 8, got {num_parts}.")
        self.num_parts, self.teacher, self.seed = num_parts, teacher, seed
        self.timesteps, self.num_noise = tuple(timesteps), num_noise

    def fit(self, volumes: Sequence[dict]) -> None:
        """Nothing to learn: each volume is clustered for itself."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        generator = torch.Generator().manual_seed(self.seed)
        found = [
            self.teacher(volume[None], t, (), generator, self.num_noise, denoised=True).denoised[0, 0]
            for t in self.timesteps
        ]
        raw, clean = volume[0].numpy(), torch.stack(found).mean(dim=0).cpu().numpy()
        labels = IntensityKMeans(2, self.seed).predict(torch.from_numpy(clean)[None])
        labels, parts, whole = clean_pieces(labels, [(0, 1)]), 2, []
        while parts < self.num_parts:
            if parts == 2:
                scores = [float(clean[labels == part].var()) for part in range(parts)]
            else:
                scores = [-float((labels == part).mean()) for part in range(parts)]
            children = share_parts(scores, 2 * parts, whole)
            divided, first, whole = np.zeros_like(labels), 0, []
            for part, count in enumerate(children):
                within = labels == part
                inside = divide_structure(raw, clean, within, count, seed=self.seed) if count > 1 else 0 * within
                divided[within] = first + inside[within]
                whole += [first] if count == 1 else []
                first += count
            labels, parts = divided, 2 * parts
        return labels.astype(np.uint8)
