"""BM4D denoising followed by k-means on the intensities of each volume."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from diffdiscover3d.baselines.kmeans import IntensityKMeans

_CACHE_SIZE = 64  # volumes; tables use the same volumes at every level, and denoising is slow
_denoised: OrderedDict[bytes, np.ndarray] = OrderedDict()


class BM4DKMeans:
    """[`IntensityKMeans`] on a volume denoised by BM4D (Maggioni et al., IEEE TIP 2013).

    The noise standard deviation of each volume is estimated by [`noise_std`].

    Args:
        num_parts, seed, restarts: options of [`IntensityKMeans`].

    Raises:
        ValueError: if the package `bm4d` is not installed. It is not a dependency because it is free for
            non-commercial use only.
    """

    name = "BM4D + k-means"

    def __init__(self, num_parts: int, seed: int = 0, restarts: int = 3):
        try:
            import bm4d
        except ImportError as error:
            raise ValueError(
                "BM4D is not installed; pip install diffdiscover3d[bm4d] (free for non-commercial use only)."
            ) from error
        self._bm4d = bm4d.bm4d
        self.kmeans = IntensityKMeans(num_parts, seed, restarts)
        self.num_parts = num_parts

    def fit(self, volumes: Sequence[dict]) -> None:
        """Does nothing: each volume is denoised and clustered independently."""

    def denoise(self, volume: torch.Tensor) -> np.ndarray:
        """Denoise a (1, H, W, D) volume; returns (H, W, D) float32. Recent results are cached."""
        values = volume[0].numpy().astype(np.float64)
        key = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()
        if key not in _denoised:
            _denoised[key] = np.asarray(self._bm4d(values, noise_std(values)), dtype=np.float32)
            while len(_denoised) > _CACHE_SIZE:
                _denoised.popitem(last=False)
        return _denoised[key]

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Segment a (1, H, W, D) volume; returns (H, W, D) uint8 labels."""
        return self.kmeans.predict(torch.from_numpy(self.denoise(volume))[None])


def noise_std(volume: np.ndarray) -> float:
    """Estimate the noise standard deviation of an (H, W, D) volume from the differences of neighbouring voxels.

    Uses the median absolute deviation, which is robust to edges (the estimator of Donoho and Johnstone, Biometrika
    1994, on the finest Haar coefficients along each axis).
    """
    spreads = [np.median(np.abs(np.diff(volume, axis=axis))) for axis in range(3)]
    return float(np.mean(spreads) / 0.6745 / np.sqrt(2))
