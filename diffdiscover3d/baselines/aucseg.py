"""Gaussian mixture on FLAIR intensities with post-processing (AUCseg, 2021): no training."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from sklearn.mixture import GaussianMixture

_BACKGROUND, _BRAIN, _TUMOUR = 0, 1, 2


class AUCSeg:
    """Voxels of the brightest of five Gaussian components of a brain-extracted FLAIR volume are called tumour.

    Components are fitted to the voxels above 0. Of the brightest one's connected regions those are kept that have at
    least a given fraction of the largest one's volume; then holes are filled.

    Args:
        num_parts: must be 3: background, brain, tumour.
        seed: of the mixture's start.
        components: of the mixture.
        min_fraction: of the largest region's volume.
        fit_voxels: random voxels to which the mixture is fitted.

    Raises:
        ValueError: for another number of parts.
    """

    name = "AUCseg"

    def __init__(
        self,
        num_parts: int = 3,
        seed: int = 0,
        components: int = 5,
        min_fraction: float = 0.2,
        fit_voxels: int = 50_000,
    ):
        if num_parts != 3:
            raise ValueError(f"AUCseg labels background, brain and tumour: `num_parts` must be 3, got {num_parts}.")
        self.num_parts, self.seed = num_parts, seed
        self.components, self.min_fraction, self.fit_voxels = components, min_fraction, fit_voxels

    def fit(self, volumes: Sequence[dict]) -> None:
        """Nothing to learn: each volume is segmented for itself."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume, 0 outside of the brain: (H, W, D) uint8."""
        values = volume[0].numpy().astype(np.float64)
        brain = values > 0
        labels = np.where(brain, _BRAIN, _BACKGROUND).astype(np.uint8)
        inside = values[brain]
        if len(np.unique(inside)) < self.components:
            return labels
        standardized = ((inside - inside.mean()) / inside.std())[:, None]
        sample = np.random.default_rng(self.seed).permutation(len(standardized))[: self.fit_voxels]
        mixture = GaussianMixture(self.components, random_state=self.seed, n_init=2).fit(standardized[sample])
        bright = np.zeros(values.shape, dtype=bool)
        bright[brain] = mixture.predict(standardized) == mixture.means_[:, 0].argmax()
        labels[keep_large_regions(bright, self.min_fraction)] = _TUMOUR
        return labels


def keep_large_regions(mask: np.ndarray, min_fraction: float) -> np.ndarray:
    """The regions (neighbours by face) with at least `min_fraction` of the largest one's voxels, holes filled.

    Args:
        mask: (H, W, D) bool.
    """
    opened = ndimage.binary_opening(mask)  # thin bridges and single voxels are noise
    regions, count = ndimage.label(opened)
    if count == 0:
        return opened
    sizes = np.bincount(regions.ravel())[1:]
    large = np.flatnonzero(sizes >= min_fraction * sizes.max()) + 1
    return ndimage.binary_fill_holes(np.isin(regions, large))
